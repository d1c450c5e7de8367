"""Why is this object still alive: who holds it, as a sentence that reads as code."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from closewait_guard._holders._forward import instances_reached, paths_forward
from closewait_guard._holders._roots import Roots
from closewait_guard._holders._search import Path, paths
from closewait_guard._holders._tell import owners_of, sentence_of, users_of

__all__ = ["Holding", "Roots", "holdings", "holdings_reached", "instances_reached"]


class Holding(NamedTuple):
    """What was found of one object. Plain text: it keeps nothing alive.

    Attributes:
        sentences: Who holds it.
        owners: The names of the types on the way, the outermost holder's first.
        has_failed: Something went wrong while it was looked for, or told.
    """

    sentences: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    has_failed: bool = False


def holdings(targets: list[object], deadline: float, roots: Roots | None = None) -> list[Holding]:
    """Find out who holds each of some objects, all at once.

    Args:
        targets: The only thing of the caller's that refers to them; it comes back empty.
        deadline: The monotonic time after which the search goes no further.
        roots: What counts as an end. Best made before the targets are taken out of weak
            references: a collection meanwhile would take the cycle apart that a target is in.
    """
    found = [Holding()] * len(targets)

    def tell(place: int, ways: list[Path]) -> None:
        found[place] = _told(ways)

    paths(targets, Roots() if roots is None else roots, deadline, tell)
    return found


def holdings_reached(
    targets: list[object], roots: Roots, is_over: Callable[[], bool]
) -> list[Holding | None]:
    """The same, without a question to the whole heap; None for what was not reached in time.

    Args:
        targets: As above.
        roots: What counts as an end, made with the values to begin with.
        is_over: Whether to stop.
    """
    found: list[Holding | None] = [None] * len(targets)

    def tell(place: int, ways: list[Path]) -> None:
        found[place] = _told(ways)

    paths_forward(targets, roots, is_over, tell)
    return found


def _told(ways: list[Path]) -> Holding:
    try:
        return _holding(ways)
    except Exception:
        # Of an object that changes while it is looked at. The others are told all the same.
        return Holding(has_failed=True)


def _holding(ways: list[Path]) -> Holding:
    best = [way for way in ways if way.rank == ways[0].rank]
    sentences = dict.fromkeys([*map(sentence_of, best), *users_of(ways)])
    owners = dict.fromkeys(owner for way in ways for owner in owners_of(way))
    return Holding(tuple(sentences), tuple(owners))
