"""Whether a count keeps growing, told from plateaus, saw teeth and noise: pure.

A leaked socket never goes away by itself, so what leaks shows in the floor beneath the counts. The
floor must rise through a whole window of points: by its rank correlation with time (Kendall), at
several distinct moments, in each third of the window, lately too, by far more than it ever fell
meanwhile, and to a level that was never seen before the window began. The slope is the median of
all slopes between two points (Theil and Sen), so that no single report decides.

Slow growth needs a long window. Two points make one of the next tier, so that each tier looks twice
as far back, coarsely, and some tens of points reach back as far as one likes.
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


# One chance in some ten thousand that counts in random order look so ordered.
_SURE = 3.8
_FEWEST_RISES = 4
# By so many times the count has risen more than it ever fell meanwhile.
_STEADY = 3
# With one report a second the last tier looks back for a year.
_MOST_TIERS = 20


class Point(NamedTuple):
    """The least and the greatest count between the point before and this one."""

    at: float
    floor: int
    peak: int


class Growth(NamedTuple):
    """How fast, in a minute; for how long, and by how much in all."""

    per_minute: float
    seconds: float
    risen: int


class _Tier(NamedTuple):
    """The last points of one resolution, what they show, and what there was before them."""

    points: tuple[Point, ...] = ()
    peak_before: int | None = None
    single: Point | None = None
    growth: Growth | None = None


class Series(NamedTuple):
    """The history of one count, in a bounded number of points.

    Example:
        >>> series = Series(window=20)
        >>> for number in range(21):
        ...     series = series.followed_by(60.0 * number, number)
        >>> series.growth
        Growth(per_minute=1.0, seconds=1140.0, risen=19)
    """

    window: int
    tiers: tuple[_Tier, ...] = ()

    @property
    def growth(self) -> Growth | None:
        """What the finest tier that shows any shows."""
        return next((tier.growth for tier in self.tiers if self._still_shows(tier)), None)

    def _still_shows(self, tier: _Tier) -> bool:
        """A coarse tier's last point may be hours old: what has been closed since ends growth."""
        fallen = tier.points[-1].floor - self.last
        return tier.growth is not None and tier.growth.risen >= _STEADY * fallen

    @property
    def last(self) -> int:
        """The count that came last."""
        return self.tiers[0].points[-1].floor

    @property
    def half_a_window_ago(self) -> int:
        """The count in the middle of the window, or the first there is."""
        points = self.tiers[0].points
        return points[-min(len(points), self.window // 2)].floor

    @property
    def is_level_at_zero(self) -> bool:
        """Whether there has been nothing for a whole window."""
        points = self.tiers[0].points
        return len(points) == self.window and not any(point.peak for point in points)

    def followed_by(self, at: float, count: int) -> Series:
        """The series with one more count."""
        tiers = list(self.tiers)
        carried: Point | None = Point(at, count, count)
        for level in range(_MOST_TIERS):
            if carried is None:
                break
            if level == len(tiers):
                tiers.append(_Tier())
            tiers[level], carried = _extended(tiers[level], carried, self.window)
        return Series(self.window, tuple(tiers))


def _extended(tier: _Tier, point: Point, window: int) -> tuple[_Tier, Point | None]:
    """The tier with a point more, and the point that it makes for the next tier, if any."""
    everything = (*tier.points, point)
    points, gone = everything[-window:], everything[:-window]
    peaks = [each.peak for each in gone]
    peak = max(peaks if tier.peak_before is None else [tier.peak_before, *peaks], default=None)
    # A first window may be the rise of a saw tooth that is just as long: wait for what follows.
    growth = _growth(points) if peak is not None and point.floor > peak else None
    if tier.single is None:
        return _Tier(points, peak, point, growth), None
    both = Point(point.at, min(tier.single.floor, point.floor), max(tier.single.peak, point.peak))
    return _Tier(points, peak, None, growth), both


def _growth(points: Sequence[Point]) -> Growth | None:
    if points[-1].floor - points[0].floor < _STEADY * _deepest_fall(points):
        return None
    rises = list(_rises(points))
    if len(rises) < _FEWEST_RISES or not _is_spread(rises, len(points)):
        return None
    if _kendall([point.floor for point in points]) < _SURE:
        return None
    first, last = points[0], points[-1]
    # Two reports in a row may carry the same time.
    seconds, risen = max(last.at - first.at, 1e-3), last.floor - first.floor
    # With few steps in a long window most pairs are level, and their median says nothing.
    slope = _median_slope(points) or risen / seconds
    return Growth(slope * 60, seconds, risen)


def _deepest_fall(points: Sequence[Point]) -> int:
    """By how much the count came down at most from the highest that it had been."""
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
    # That of the statistics module brings decimals and fractions into every program: 5 ms.
    ordered, middle = sorted(values), len(values) // 2
    return (ordered[middle] + ordered[-middle - 1]) / 2 if ordered else 0.0


def _rises(points: Sequence[Point]) -> Iterator[int]:
    """Where the count rises above a level to which it never comes back."""
    lasting: list[float] = []
    for point in reversed(points):
        lasting.append(min(point.floor, lasting[-1] if lasting else math.inf))
    lasting.reverse()
    for place, (before, after) in enumerate(pairwise(lasting), 1):
        if after > before:
            yield place


def _is_spread(rises: Sequence[int], length: int) -> bool:
    """Whether it has risen from one end to the other: at most three usual pauses without a rise."""
    longest = 3 * _median([later - sooner for sooner, later in pairwise(rises)])
    thirds = {place * 3 // length for place in rises}
    return len(thirds) == 3 and rises[0] <= longest and length - 1 - rises[-1] <= longest


def _kendall(counts: Sequence[int]) -> float:
    """By how many standard deviations the counts are more in order than by chance (with ties)."""
    score = sum((later > sooner) - (later < sooner) for sooner, later in combinations(counts, 2))
    ties = [counts.count(value) for value in set(counts)]
    spread = _spread(len(counts)) - sum(map(_spread, ties))
    return (score - 1) / math.sqrt(spread / 18) if spread > 0 and score > 0 else 0.0


def _spread(size: int) -> int:
    return size * (size - 1) * (2 * size + 5)
