"""Alerts that one report alone justifies: counts, shares and ages beyond their limits. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from closewait_guard._words import count_of, seconds
from closewait_guard.model import Alert, AlertKind, Leak, Report, Severity, State
from closewait_guard.settings import Settings

__all__ = ["Standing", "crossed", "standing"]

# An alert that stands ends only when its value is well below the limit, not just beneath it.
_WELL_BELOW = 0.9


class Standing(NamedTuple):
    """An alert that holds at this moment: what it is of, and how large its value is."""

    key: str
    size: float
    alert: Alert


def crossed(report: Report, settings: Settings) -> tuple[Alert, ...]:
    """The alerts of a report that is no part of a series."""
    return tuple(each.alert for each in standing(report, settings))


def standing(
    report: Report, settings: Settings, active: Collection[str] = ()
) -> Iterator[Standing]:
    """The alerts that hold at this moment; those that are active already hold a little longer."""
    yield from _count(report, settings, active)
    yield from _fd_limit(report, settings, active)
    yield from _age(report, settings)


def _limit(kind: AlertKind, limit: float, active: Collection[str]) -> float:
    return limit * _WELL_BELOW if kind.value in active else limit


def _close_wait(report: Report) -> int:
    return sum(leak.observation.state is State.CLOSE_WAIT for leak in report.leaks)


def _count(report: Report, settings: Settings, active: Collection[str]) -> Iterator[Standing]:
    count = _close_wait(report)
    if count > _limit(AlertKind.COUNT, settings.count_warning, active):
        message = f"{count_of(count, 'socket')} in CLOSE_WAIT, more than {settings.count_warning:,}"
        data = {"count": count, "limit": settings.count_warning}
        alert = Alert(AlertKind.COUNT, Severity.WARNING, message, data)
        yield Standing(AlertKind.COUNT, count, alert)


def _fd_limit(report: Report, settings: Settings, active: Collection[str]) -> Iterator[Standing]:
    limit, used, count = report.fd_limit, report.fd_used or 0, _close_wait(report)
    if not limit:
        return
    waiting = _limit(AlertKind.FD_LIMIT, limit * settings.fd_share_critical, active)
    in_use = _limit(AlertKind.FD_LIMIT, limit * settings.fd_used_critical, active)
    if count > waiting or used > in_use:
        in_use_now = f"{used:,} of {limit:,} descriptors are in use ({used / limit:.0%})"
        if report.fd_used is None:
            in_use_now = f"the limit is {limit:,} descriptors"
        message = f"{in_use_now}, {count:,} of them in CLOSE_WAIT"
        data = {"fd_used": report.fd_used, "fd_limit": limit, "count": count}
        alert = Alert(AlertKind.FD_LIMIT, Severity.CRITICAL, message, data)
        yield Standing(AlertKind.FD_LIMIT, max(used, count), alert)


def _age(report: Report, settings: Settings) -> Iterator[Standing]:
    waiting = [leak for leak in report.accused if leak.observation.state is State.CLOSE_WAIT]
    oldest = max(waiting, key=_waits_for, default=None)
    if oldest is None or _waits_for(oldest) <= min(settings.age_warning, settings.age_critical):
        return
    age = _waits_for(oldest)
    is_critical = age > settings.age_critical
    limit = settings.age_critical if is_critical else settings.age_warning
    count = sum(_waits_for(leak) > limit for leak in waiting)
    site = oldest.observation.record.site
    where = f", born at {site.call}" if site is not None else ""
    message = (
        f"{count_of(count, 'socket')} in CLOSE_WAIT for more than {seconds(limit)}; "
        f"the oldest for {seconds(age)}{where}"
    )
    data = {"count": count, "oldest_s": round(age, 3), "site": site.place if site else None}
    severity = Severity.CRITICAL if is_critical else Severity.WARNING
    # Time alone is no news: what is told again is that there are many more.
    yield Standing(AlertKind.AGE, count, Alert(AlertKind.AGE, severity, message, data))


def _waits_for(leak: Leak) -> float:
    return leak.observation.peer_closed_for or 0.0
