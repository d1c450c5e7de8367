"""Alerts that only a series of reports justifies: growth, churn, descriptors running out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from closewait_guard._growth import Growth, Series
from closewait_guard._population import Population
from closewait_guard._thresholds import Standing
from closewait_guard._words import count_of, seconds
from closewait_guard.model import Alert, AlertKind, Report, Scalar, Severity

__all__ = ["TOTAL", "Moment", "churning", "exhausted", "growing"]

# In place of a site.
TOTAL = ""

# Fewer healthy sockets than these come and go with the load.
_FEWEST_KEPT = 10
_MOSTLY = 0.8
_SOON = 3600.0
_EXHAUSTED_FOR = 60.0


class Moment(NamedTuple):
    """One report, and what else is known at its time.

    Attributes:
        at: By a clock that never jumps.
        open_by_site: Healthy sockets too; `old` are those from before half a window ago.
        exhausted: How often no descriptor was left to make or accept a socket, so far.
        still_open: Serials of those accused before that are open yet.
    """

    at: float
    report: Report
    open_by_site: Mapping[str, Population]
    exhausted: int
    still_open: frozenset[int]


def growing(leaked: Mapping[str, Series], moment: Moment) -> Iterator[Standing]:
    """Sites, or the total, whose leaked count keeps growing."""
    sites = {site: series.growth for site, series in leaked.items() if series.growth}
    # The total says nothing that its sites do not say better.
    for site, growth in sites.items():
        if growth is not None and (site != TOTAL or len(sites) == 1):
            yield _growth_alert(site, growth, leaked[site].last, moment.report)


def _growth_alert(site: str, growth: Growth, count: int, report: Report) -> Standing:
    left = _time_left(growth, report)
    where = f"of {site} " if site else ""
    message = (
        f"leaked sockets {where}keep growing: {count:,} now, {growth.risen:,} more than "
        f"{seconds(growth.seconds)} ago, {growth.per_minute:.2g} a minute"
    )
    if left is not None:
        message += f"; at this rate the descriptor limit is reached in {seconds(left)}"
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
    return Standing(f"{AlertKind.GROWTH}:{site}", count, alert)


def _time_left(growth: Growth, report: Report) -> float | None:
    if not report.fd_limit or report.fd_used is None or growth.per_minute <= 0:
        return None
    return max(0, report.fd_limit - report.fd_used) / growth.per_minute * 60


def churning(
    opened: Mapping[str, Series], leaked: Mapping[str, Series], moment: Moment
) -> Iterator[Standing]:
    """Sites whose sockets are made faster than they are closed, though no peer has left them."""
    for site, series in opened.items():
        growth, leaking = series.growth, leaked.get(site)
        if (
            growth is None
            or growth.risen < _FEWEST_KEPT
            or (leaking is not None and leaking.growth)
        ):
            continue
        now = moment.open_by_site.get(site, Population(0, 0))
        before = series.half_a_window_ago
        # Many connections that are all short make a crowd of sockets too, but never the same ones.
        if now.old < before * _MOSTLY:
            continue
        message = (
            f"sockets of {site} are made faster than they are closed: {now.open:,} are open, "
            f"{growth.risen:,} more than {seconds(growth.seconds)} ago, and {now.old:,} of the "
            f"{before:,} that were open half-way are open still"
        )
        data: dict[str, Scalar] = {
            "site": site,
            "count": now.open,
            "per_minute": round(growth.per_minute, 4),
            "risen": growth.risen,
            "seconds": round(growth.seconds, 1),
        }
        alert = Alert(AlertKind.CHURN, Severity.WARNING, message, data)
        yield Standing(f"{AlertKind.CHURN}:{site}", now.open, alert)


def exhausted(moment: Moment, before: int, last_at: float | None) -> Iterator[Standing]:
    """That no descriptor was left; holds for a minute after the last time."""
    if last_at is None or moment.at - last_at > _EXHAUSTED_FOR:
        return
    failed = moment.exhausted - before
    report = moment.report
    message = (
        f"no descriptor was left for {count_of(failed, 'socket')} to be made or accepted; "
        f"{report.fd_used or 0:,} of {report.fd_limit or 0:,} are in use"
    )
    data = {"count": failed, "fd_used": report.fd_used, "fd_limit": report.fd_limit}
    alert = Alert(AlertKind.FD_EXHAUSTED, Severity.CRITICAL, message, data)
    yield Standing(AlertKind.FD_EXHAUSTED, 1, alert)
