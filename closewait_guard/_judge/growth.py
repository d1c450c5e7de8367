"""Detect whether a count keeps growing, as opposed to plateaus, saw teeth and noise. Pure.

A leaked socket never goes away by itself, so a leak raises the minimum of the counts. This minimum
must rise through a whole window of points: by its rank correlation with time (Kendall), at several
distinct times, in each third of the window, recently too, by far more than it ever fell, and to a
level above all counts before the window. The slope is the median of all slopes between two points
(Theil and Sen), so that no single report decides.

Slow growth needs a long window. Two points make one of the next tier, so that each tier looks twice
as far back at half the resolution, and a few dozen points cover any length of time.

The alerts on growth are here too, and the values of which all alerts are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, combinations, pairwise
from typing import NamedTuple

from closewait_guard._enums import DESCRIPTOR_KIND
from closewait_guard._format import format_duration
from closewait_guard._inspect import SiteCount
from closewait_guard._judge.codes import ALERT_CODES
from closewait_guard.model import Alert, AlertKind, Report, Scalar, Severity

__all__ = [
    "OF_KIND",
    "TOTAL",
    "ActiveAlert",
    "Growth",
    "Point",
    "Series",
    "SeriesPoint",
    "churn_alerts",
    "fastest_growth",
    "growth_alerts",
    "last_count",
    "make_alert",
    "what_grows",
]


# The probability that counts in random order look so ordered is about one in ten thousand.
_MIN_KENDALL = 3.8
_MIN_RISES = 4
# The rise in the window, divided by the deepest fall in it.
_MIN_RISE_PER_FALL = 3
# With one report a second the last tier looks back for a year.
_MAX_TIERS = 20


class Point(NamedTuple):
    """The smallest and largest count since the point before."""

    at: float
    floor: int
    peak: int


class Growth(NamedTuple):
    """The growth per minute, its duration, and the total rise."""

    per_minute: float
    seconds: float
    risen: int


class _Tier(NamedTuple):
    """The last points of one resolution, the growth that they show, and the peak before them."""

    points: tuple[Point, ...] = ()
    peak_before: int | None = None
    single: Point | None = None
    growth: Growth | None = None


class Series(NamedTuple):
    """The history of one count, in a bounded number of points.

    Example:
        >>> series = Series(window=20)
        >>> for number in range(21):
        ...     series = series.with_count(60.0 * number, number)
        >>> series.growth
        Growth(per_minute=1.0, seconds=1140.0, risen=19)
    """

    window: int
    tiers: tuple[_Tier, ...] = ()

    @property
    def growth(self) -> Growth | None:
        """The growth that the finest tier shows, if any does."""
        return next((tier.growth for tier in self.tiers if self._still_grows(tier)), None)

    def _still_grows(self, tier: _Tier) -> bool:
        """Whether sockets closed since a tier's last point, maybe hours ago, leave its growth."""
        fallen = tier.points[-1].floor - self.last
        return tier.growth is not None and tier.growth.risen >= _MIN_RISE_PER_FALL * fallen

    @property
    def last(self) -> int:
        """The latest count."""
        return self.tiers[0].points[-1].floor

    @property
    def count_half_window_ago(self) -> int:
        """The count in the middle of the window, or the first in a shorter series."""
        points = self.tiers[0].points
        return points[-min(len(points), self.window // 2)].floor

    @property
    def is_level_at_zero(self) -> bool:
        """Whether the count has been zero for a whole window."""
        points = self.tiers[0].points
        return len(points) == self.window and not any(point.peak for point in points)

    def with_count(self, at: float, count: int) -> Series:
        """The series with one more count."""
        tiers = list(self.tiers)
        carried: Point | None = Point(at, count, count)
        for level in range(_MAX_TIERS):
            if carried is None:
                break
            if level == len(tiers):
                tiers.append(_Tier())
            tiers[level], carried = _extend_tier(tiers[level], carried, self.window)
        return Series(self.window, tuple(tiers))


def _extend_tier(tier: _Tier, point: Point, window: int) -> tuple[_Tier, Point | None]:
    """Add a point to a tier; also return the point that this makes for the next tier, if any."""
    all_points = (*tier.points, point)
    points, gone = all_points[-window:], all_points[:-window]
    peaks = [each.peak for each in gone]
    peak = max(peaks if tier.peak_before is None else [tier.peak_before, *peaks], default=None)
    # The first window may be the rise of a saw tooth of the same length: wait for more points.
    growth = _find_growth(points) if peak is not None and point.floor > peak else None
    if tier.single is None:
        return _Tier(points, peak, point, growth), None
    both = Point(point.at, min(tier.single.floor, point.floor), max(tier.single.peak, point.peak))
    return _Tier(points, peak, None, growth), both


def _find_growth(points: Sequence[Point]) -> Growth | None:
    if points[-1].floor - points[0].floor < _MIN_RISE_PER_FALL * _deepest_fall(points):
        return None
    rises = list(_find_rises(points))
    if len(rises) < _MIN_RISES or not _is_spread(rises, len(points)):
        return None
    if _kendall([point.floor for point in points]) < _MIN_KENDALL:
        return None
    first, last = points[0], points[-1]
    # Two consecutive reports may have the same time.
    seconds, risen = max(last.at - first.at, 1e-3), last.floor - first.floor
    # With few steps in a long window most pairs are level, and their median is zero.
    slope = _median_slope(points) or risen / seconds
    return Growth(slope * 60, seconds, risen)


def _deepest_fall(points: Sequence[Point]) -> int:
    """The largest fall of the count from its highest value so far."""
    highest = accumulate((point.floor for point in points), max)
    return max(high - point.floor for high, point in zip(highest, points, strict=True))


def _median_slope(points: Sequence[Point]) -> float:
    slopes = [
        (later.floor - sooner.floor) / (later.at - sooner.at)
        for sooner, later in combinations(points, 2)
        if later.at > sooner.at
    ]
    return _median(slopes)


def _median(values: Sequence[float]) -> float:
    # statistics.median would import decimal and fractions into every program: 5 ms.
    ordered, middle = sorted(values), len(values) // 2
    return (ordered[middle] + ordered[-middle - 1]) / 2 if ordered else 0.0


def _find_rises(points: Sequence[Point]) -> Iterator[int]:
    """Yield where the count rises above a level to which it never returns."""
    lasting: list[float] = []
    for point in reversed(points):
        lasting.append(min(point.floor, lasting[-1] if lasting else math.inf))
    lasting.reverse()
    for place, (before, after) in enumerate(pairwise(lasting), 1):
        if after > before:
            yield place


def _is_spread(rises: Sequence[int], length: int) -> bool:
    """Whether the rises cover the window: no gap at its ends is over three typical gaps."""
    longest = 3 * _median([later - sooner for sooner, later in pairwise(rises)])
    thirds = {place * 3 // length for place in rises}
    return len(thirds) == 3 and rises[0] <= longest and length - 1 - rises[-1] <= longest


def _kendall(counts: Sequence[int]) -> float:
    """Kendall's rank correlation with time, in standard deviations, corrected for ties."""
    score = sum((later > sooner) - (later < sooner) for sooner, later in combinations(counts, 2))
    ties = [counts.count(value) for value in set(counts)]
    spread = _spread(len(counts)) - sum(map(_spread, ties))
    return (score - 1) / math.sqrt(spread / 18) if spread > 0 and score > 0 else 0.0


def _spread(size: int) -> int:
    return size * (size - 1) * (2 * size + 5)


# In place of a site: all leaks; and how the descriptors of a kind are called.
TOTAL, OF_KIND = "", "descriptors of kind "
# Fewer healthy sockets, or files, than this come and go with the load.
_MIN_CHURN = 10
_MIN_SHARE_STILL_OPEN = 0.8
_CRITICAL_TIME_LEFT = 3600.0


class ActiveAlert(NamedTuple):
    """An alert whose condition holds now: its kind and site, and the value that triggered it."""

    key: str
    size: float
    alert: Alert


class SeriesPoint(NamedTuple):
    """One report of a series, and what else is known at its time.

    Attributes:
        at: By a monotonic clock.
        open_by_site: Healthy sockets too; `old` counts those opened over half a window ago.
        exhausted: How often no descriptor was left to create or accept a socket, so far.
        still_open: Serials of leaks of the report before that are still open.
    """

    at: float
    report: Report
    open_by_site: Mapping[str, SiteCount]
    exhausted: int
    still_open: frozenset[int]


def make_alert(
    kind: AlertKind, severity: Severity, message: str, data: Mapping[str, Scalar]
) -> Alert:
    """An alert with its code."""
    return Alert(kind, severity, message, data, code=ALERT_CODES[kind])


def growth_alerts(leaked: Mapping[str, Series], point: SeriesPoint) -> Iterator[ActiveAlert]:
    """Yield alerts for sites, or the total, whose leaks keep growing, and for kinds that do."""
    growths = {site: growth for site, each in leaked.items() if (growth := each.growth)}
    kinds = {site for site in growths if site.startswith(OF_KIND)}
    for site, growth in growths.items():
        if site in kinds:
            is_news = growth.risen >= _MIN_CHURN
        else:
            # The total is reported only if no site of its own explains it.
            is_news = site != TOTAL or growths.keys() - kinds == {TOTAL}
        if is_news:
            yield _make_growth_alert(site, growth, leaked[site].last, point.report)


def _make_growth_alert(site: str, growth: Growth, count: int, report: Report) -> ActiveAlert:
    left = _seconds_left(growth, report)
    kind = site.removeprefix(OF_KIND)
    message = (
        f"{what_grows(site)} keep growing: {count:,} now, {growth.risen:,} more than "
        f"{format_duration(growth.seconds)} ago, {_rate(growth)} a minute"
    )
    if left is not None:
        message += f"; at this rate the descriptor limit is reached in {format_duration(left)}"
    data: dict[str, Scalar] = {
        "site": (site or None) if kind == site else None,
        "count": count,
        "per_minute": round(growth.per_minute, 4),
        "risen": growth.risen,
        "seconds": round(growth.seconds, 1),
        "limit_reached_in_s": None if left is None else round(left),
    }
    if kind != site:
        data[DESCRIPTOR_KIND] = kind
    is_near = left is not None and left < _CRITICAL_TIME_LEFT
    severity = Severity.CRITICAL if is_near else Severity.WARNING
    alert = make_alert(AlertKind.GROWTH, severity, message, data)
    return ActiveAlert(f"{AlertKind.GROWTH}:{site}", count, alert)


def fastest_growth(leaked: Mapping[str, Series], report: Report) -> tuple[float, float]:
    """How many more leaked sockets there are a minute, and the seconds to the descriptor limit.

    The growth is zero, and the time infinite, unless something keeps growing.
    """
    growths = {site: growth for site, each in leaked.items() if (growth := each.growth)}
    leaks = [each.per_minute for site, each in growths.items() if not site.startswith(OF_KIND)]
    times = (_seconds_left(each, report) for each in growths.values())
    left = [seconds for seconds in times if seconds is not None]
    return max(leaks, default=0.0), min(left, default=math.inf)


def what_grows(site: str) -> str:
    """Of what there are more and more, by the key of their series."""
    if site.startswith(OF_KIND):
        return site
    return f"leaked sockets of {site}" if site else "leaked sockets"


def _rate(growth: Growth) -> str:
    return f"{growth.per_minute:,.0f}" if growth.per_minute >= 10 else f"{growth.per_minute:.2g}"


def _seconds_left(growth: Growth, report: Report) -> float | None:
    if not report.fd_limit or report.fd_used is None or growth.per_minute <= 0:
        return None
    return max(0, report.fd_limit - report.fd_used) / growth.per_minute * 60


def churn_alerts(
    opened: Mapping[str, Series], leaked: Mapping[str, Series], point: SeriesPoint
) -> Iterator[ActiveAlert]:
    """Yield alerts for sites that open sockets faster than they close them, without a leak."""
    for site, series in opened.items():
        growth, leaking = series.growth, leaked.get(site)
        if growth is None or growth.risen < _MIN_CHURN or (leaking is not None and leaking.growth):
            continue
        count, before = series.last, series.count_half_window_ago
        # Those that have leaked may all be old.
        old = point.open_by_site.get(site, SiteCount(0, 0)).old - last_count(leaked, site)
        # Many short connections also make many open sockets, but never the same ones.
        if not count or old < before * _MIN_SHARE_STILL_OPEN:
            continue
        message = (
            f"sockets of {site} are made faster than they are closed: {count:,} are open, "
            f"{growth.risen:,} more than {format_duration(growth.seconds)} ago, and {old:,} of "
            f"the {before:,} that were open half-way are open still"
        )
        data: dict[str, Scalar] = {
            "site": site,
            "count": count,
            "per_minute": round(growth.per_minute, 4),
            "risen": growth.risen,
            "seconds": round(growth.seconds, 1),
        }
        alert = make_alert(AlertKind.CHURN, Severity.WARNING, message, data)
        yield ActiveAlert(f"{AlertKind.CHURN}:{site}", count, alert)


def last_count(counts: Mapping[str, Series], site: str) -> int:
    """The latest count of a site."""
    return counts[site].last if site in counts else 0
