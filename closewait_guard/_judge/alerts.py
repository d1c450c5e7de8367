"""Alerts that one report alone justifies: counts, shares and ages beyond their limits. Pure.

Alerts that only a series of reports justifies: growth, churn, descriptors running out. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from closewait_guard._format import format_duration, pluralize
from closewait_guard._inspect import SiteCount
from closewait_guard._judge.growth import Growth, Series
from closewait_guard.model import Alert, AlertKind, Finding, Report, Scalar, Severity, State
from closewait_guard.settings import Settings

__all__ = [
    "TOTAL",
    "ActiveAlert",
    "SeriesPoint",
    "churning",
    "exhausted",
    "growing",
    "standing",
    "threshold_alerts",
]


# An alert that stands ends only when its value is well below the limit, not just beneath it.
_WELL_BELOW = 0.9


class ActiveAlert(NamedTuple):
    """An alert that holds at this moment: what it is of, and how large its value is."""

    key: str
    size: float
    alert: Alert


def threshold_alerts(report: Report, settings: Settings) -> tuple[Alert, ...]:
    """The alerts of a report that is no part of a series."""
    return tuple(each.alert for each in standing(report, settings))


def standing(
    report: Report, settings: Settings, active: Collection[str] = ()
) -> Iterator[ActiveAlert]:
    """The alerts that hold at this moment; those that are active already hold a little longer."""
    yield from _count(report, settings, active)
    yield from _fd_limit(report, settings, active)
    yield from _age(report, settings)


def _limit(kind: AlertKind, limit: float, active: Collection[str]) -> float:
    return limit * _WELL_BELOW if kind.value in active else limit


def _close_wait(report: Report) -> int:
    return sum(leak.observation.state is State.CLOSE_WAIT for leak in report.findings)


def _count(report: Report, settings: Settings, active: Collection[str]) -> Iterator[ActiveAlert]:
    count = _close_wait(report)
    if count > _limit(AlertKind.COUNT, settings.count_warning, active):
        message = (
            f"{pluralize(count, 'socket')} in CLOSE_WAIT, more than {settings.count_warning:,}"
        )
        data = {"count": count, "limit": settings.count_warning}
        alert = Alert(AlertKind.COUNT, Severity.WARNING, message, data)
        yield ActiveAlert(AlertKind.COUNT, count, alert)


def _fd_limit(report: Report, settings: Settings, active: Collection[str]) -> Iterator[ActiveAlert]:
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
        yield ActiveAlert(AlertKind.FD_LIMIT, max(used, count), alert)


def _age(report: Report, settings: Settings) -> Iterator[ActiveAlert]:
    waiting = [leak for leak in report.leaks if leak.observation.state is State.CLOSE_WAIT]
    oldest = max(waiting, key=_waits_for, default=None)
    if oldest is None or _waits_for(oldest) <= min(settings.age_warning, settings.age_critical):
        return
    age = _waits_for(oldest)
    is_critical = age > settings.age_critical
    limit = settings.age_critical if is_critical else settings.age_warning
    count = sum(_waits_for(leak) > limit for leak in waiting)
    site = oldest.observation.record.site
    where = f", opened at {site.call}" if site is not None else ""
    message = (
        f"{pluralize(count, 'socket')} in CLOSE_WAIT for more than {format_duration(limit)}; "
        f"the oldest for {format_duration(age)}{where}"
    )
    data = {"count": count, "oldest_s": round(age, 3), "site": site.place if site else None}
    severity = Severity.CRITICAL if is_critical else Severity.WARNING
    # Time alone is no news: what is told again is that there are many more.
    yield ActiveAlert(AlertKind.AGE, count, Alert(AlertKind.AGE, severity, message, data))


def _waits_for(leak: Finding) -> float:
    return leak.observation.peer_closed_for or 0.0


# In place of a site.
TOTAL = ""

# Fewer healthy sockets than these come and go with the load.
_FEWEST_KEPT = 10
_MOSTLY = 0.8
_SOON = 3600.0
_EXHAUSTED_FOR = 60.0


class SeriesPoint(NamedTuple):
    """One report, and what else is known at its time.

    Attributes:
        at: By a clock that never jumps.
        open_by_site: Healthy sockets too; `old` are those from before half a window ago.
        exhausted: How often no descriptor was left to make or accept a socket, so far.
        still_open: Serials of those accused before that are open yet.
    """

    at: float
    report: Report
    open_by_site: Mapping[str, SiteCount]
    exhausted: int
    still_open: frozenset[int]


def growing(leaked: Mapping[str, Series], moment: SeriesPoint) -> Iterator[ActiveAlert]:
    """Sites, or the total, whose leaked count keeps growing."""
    sites = {site: series.growth for site, series in leaked.items() if series.growth}
    # The total says nothing that its sites do not say better.
    for site, growth in sites.items():
        if growth is not None and (site != TOTAL or len(sites) == 1):
            yield _growth_alert(site, growth, leaked[site].last, moment.report)


def _growth_alert(site: str, growth: Growth, count: int, report: Report) -> ActiveAlert:
    left = _time_left(growth, report)
    where = f"of {site} " if site else ""
    message = (
        f"leaked sockets {where}keep growing: {count:,} now, {growth.risen:,} more than "
        f"{format_duration(growth.seconds)} ago, {growth.per_minute:.2g} a minute"
    )
    if left is not None:
        message += f"; at this rate the descriptor limit is reached in {format_duration(left)}"
    data: dict[str, Scalar] = {
        "site": site or None,
        "count": count,
        "per_minute": round(growth.per_minute, 4),
        "risen": growth.risen,
        "seconds": round(growth.seconds, 1),
        "limit_reached_in_s": None if left is None else round(left),
    }
    is_near = left is not None and left < _SOON
    severity = Severity.CRITICAL if is_near else Severity.WARNING
    alert = Alert(AlertKind.GROWTH, severity, message, data)
    return ActiveAlert(f"{AlertKind.GROWTH}:{site}", count, alert)


def _time_left(growth: Growth, report: Report) -> float | None:
    if not report.fd_limit or report.fd_used is None or growth.per_minute <= 0:
        return None
    return max(0, report.fd_limit - report.fd_used) / growth.per_minute * 60


def churning(
    opened: Mapping[str, Series], leaked: Mapping[str, Series], moment: SeriesPoint
) -> Iterator[ActiveAlert]:
    """Sites whose sockets are made faster than they are closed, though no peer has left them."""
    for site, series in opened.items():
        growth, leaking = series.growth, leaked.get(site)
        if (
            growth is None
            or growth.risen < _FEWEST_KEPT
            or (leaking is not None and leaking.growth)
        ):
            continue
        now = moment.open_by_site.get(site, SiteCount(0, 0))
        before = series.half_a_window_ago
        # Many connections that are all short make a crowd of sockets too, but never the same ones.
        if now.old < before * _MOSTLY:
            continue
        message = (
            f"sockets of {site} are made faster than they are closed: {now.open:,} are open, "
            f"{growth.risen:,} more than {format_duration(growth.seconds)} ago, and {now.old:,} of "
            f"the {before:,} that were open half-way are open still"
        )
        data: dict[str, Scalar] = {
            "site": site,
            "count": now.open,
            "per_minute": round(growth.per_minute, 4),
            "risen": growth.risen,
            "seconds": round(growth.seconds, 1),
        }
        alert = Alert(AlertKind.CHURN, Severity.WARNING, message, data)
        yield ActiveAlert(f"{AlertKind.CHURN}:{site}", now.open, alert)


def exhausted(moment: SeriesPoint, before: int, last_at: float | None) -> Iterator[ActiveAlert]:
    """That no descriptor was left; holds for a minute after the last time."""
    if last_at is None or moment.at - last_at > _EXHAUSTED_FOR:
        return
    failed = moment.exhausted - before
    report = moment.report
    message = (
        f"no descriptor was left for {pluralize(failed, 'socket')} to be made or accepted; "
        f"{report.fd_used or 0:,} of {report.fd_limit or 0:,} are in use"
    )
    data = {"count": failed, "fd_used": report.fd_used, "fd_limit": report.fd_limit}
    alert = Alert(AlertKind.FD_EXHAUSTED, Severity.CRITICAL, message, data)
    yield ActiveAlert(AlertKind.FD_EXHAUSTED, 1, alert)
