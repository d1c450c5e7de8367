"""How many sockets are open by the line that made them, and how many have been for long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from closewait_guard._records import record_of
from closewait_guard._stack import settle
from closewait_guard._story import SERIAL, STACK, Story

__all__ = ["Population", "populations"]


class Population(NamedTuple):
    """The open sockets of one site, and those of them that are older than a mark."""

    open: int
    old: int


def populations(stories: Iterable[Story], mark: int, pid: int) -> dict[str, Population]:
    """Count by site; sockets that were born nobody knows where are left out."""
    counts: dict[int, list[int]] = {}
    examples: dict[int, Story] = {}
    for story in stories:
        stack = story[STACK]
        settle(stack)
        if stack:
            # Equal stacks are one object once they are settled.
            key = id(stack[0])
            count = counts.setdefault(key, [0, 0])
            count[0] += 1
            count[1] += story[SERIAL] <= mark
            examples[key] = story
    found: dict[str, Population] = {}
    for key, (now, old) in counts.items():
        site = record_of(examples[key], pid).site
        if site is not None:
            before = found.get(site.call, Population(0, 0))
            found[site.call] = Population(before.open + now, before.old + old)
    return found
