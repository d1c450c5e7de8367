"""Why is this object still alive: who holds it, as a sentence that reads as code."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from closewait_guard._holders.describe import owners_of, sentence_of, threads_using
from closewait_guard._holders.references import HolderPath, instances_reached, paths, paths_forward
from closewait_guard._holders.roots import Roots

__all__ = [
    "Holders",
    "Roots",
    "find_holders",
    "find_holders_forward",
    "instances_reached",
]


class Holders(NamedTuple):
    """What was found of one object. Plain text: it keeps nothing alive.

    Attributes:
        sentences: Who holds it.
        owners: The names of the types on the way, the outermost holder's first.
        has_failed: Something went wrong while it was looked for, or told.
    """

    sentences: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    has_failed: bool = False


def find_holders(
    targets: list[object], deadline: float, roots: Roots | None = None
) -> list[Holders]:
    """Find out who holds each of some objects, all at once.

    Args:
        targets: The only thing of the caller's that refers to them; it comes back empty.
        deadline: The monotonic time after which the search goes no further.
        roots: What counts as an end. Best made before the targets are taken out of weak
            references: a collection meanwhile would take the cycle apart that a target is in.
    """
    found = [Holders()] * len(targets)

    def tell(place: int, ways: list[HolderPath]) -> None:
        found[place] = _told(ways)

    paths(targets, Roots() if roots is None else roots, deadline, tell)
    return found


def find_holders_forward(
    targets: list[object], roots: Roots, is_over: Callable[[], bool]
) -> list[Holders | None]:
    """The same, without a question to the whole heap; None for what was not reached in time.

    Args:
        targets: As above.
        roots: What counts as an end, made with the values to begin with.
        is_over: Whether to stop.
    """
    found: list[Holders | None] = [None] * len(targets)

    def tell(place: int, ways: list[HolderPath]) -> None:
        found[place] = _told(ways)

    paths_forward(targets, roots, is_over, tell)
    return found


def _told(ways: list[HolderPath]) -> Holders:
    try:
        return _holding(ways)
    except Exception:
        # Of an object that changes while it is looked at. The others are told all the same.
        return Holders(has_failed=True)


def _holding(ways: list[HolderPath]) -> Holders:
    best = [way for way in ways if way.rank == ways[0].rank]
    sentences = dict.fromkeys([*map(sentence_of, best), *threads_using(ways)])
    owners = dict.fromkeys(owner for way in ways for owner in owners_of(way))
    return Holders(tuple(sentences), tuple(owners))
