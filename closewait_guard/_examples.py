"""A report cut down to some examples of each site, with the numbers of all: pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from closewait_guard.model import Closed, Leak, Report, site_key

__all__ = ["with_examples"]

_Item = TypeVar("_Item", Leak, Closed)


def with_examples(report: Report, most: int) -> Report:
    """At most so many leaks of each site: those that have been useless for the longest.

    The first of them counts those that were left out. Without a stack nothing but the peers tells
    one site from another, so that all of those are kept.
    """
    return replace(
        report,
        leaks=_some(report.leaks, most, lambda leak: leak, _age, _standing_for),
        closed=_some(
            report.closed,
            most,
            lambda closed: closed.leak,
            lambda closed: closed.after,
            lambda closed, count: replace(closed, leak=_standing_for(closed.leak, count)),
        ),
    )


def _some(
    items: Sequence[_Item],
    most: int,
    leak_of: Callable[[_Item], Leak],
    age_of: Callable[[_Item], float],
    standing_for: Callable[[_Item, int], _Item],
) -> tuple[_Item, ...]:
    groups: dict[object, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(site_key(leak_of(item)), []).append(place)
    kept: dict[int, _Item] = {}
    for places in groups.values():
        if len(places) > most and leak_of(items[places[0]]).observation.record.site is not None:
            total = sum(leak_of(items[place]).count for place in places)
            oldest = sorted(places, key=lambda place: -age_of(items[place]))[:most]
            others = sum(leak_of(items[place]).count for place in oldest[1:])
            kept[oldest[0]] = standing_for(items[oldest[0]], total - others)
        else:
            oldest = places
        for place in oldest:
            kept.setdefault(place, items[place])
    return tuple(kept[place] for place in sorted(kept))


def _age(leak: Leak) -> float:
    return leak.observation.useless_for


def _standing_for(leak: Leak, count: int) -> Leak:
    return replace(leak, count=count)
