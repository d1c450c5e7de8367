"""Detect whether a count keeps growing, as opposed to plateaus, saw teeth and noise. Pure.

A leaked socket never goes away by itself, so a leak raises the minimum of the counts. This minimum
must rise through a whole window of points: by its rank correlation with time (Kendall), at several
distinct times, in each third of the window, recently too, by far more than it ever fell, and to a
level above all counts before the window. The slope is the median of all slopes between two points
(Theil and Sen), so that no single report decides.

Slow growth needs a long window. Two points make one of the next tier, so that each tier looks twice
as far back at half the resolution, and a few dozen points cover any length of time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise
from typing import NamedTuple

__all__ = [
    "Growth",
    "Point",
    "Series",
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
