"""Find out why objects are still alive: who holds each, as a sentence that reads as code."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from closewait_guard._holders.describe import owners_of, sentence_of, threads_using
from closewait_guard._holders.references import (
    HolderPath,
    find_paths,
    find_paths_forward,
    find_unused,
    reachable_instances,
)
from closewait_guard._holders.roots import Roots

__all__ = [
    "Holders",
    "Roots",
    "find_holders",
    "find_holders_forward",
    "find_unused",
    "reachable_instances",
]


class Holders(NamedTuple):
    """Who holds one object. Plain text: it keeps nothing alive.

    Attributes:
        sentences: Each says who holds it, and how.
        owners: The names of the types on the paths, the outermost holder's first.
        has_failed: The search or the description raised an exception.
    """

    sentences: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    has_failed: bool = False


def find_holders(
    targets: list[object], deadline: float, roots: Roots | None = None
) -> list[Holders]:
    """Find out who holds each of some objects, all at once.

    Args:
        targets: The objects. The caller must have no other reference to them; the list is emptied.
        deadline: The monotonic time after which the search goes no further.
        roots: Where a path may end. Make it before the targets are taken out of weak references: a
            garbage collection meanwhile would break up the cycle that a target is in.
    """
    found = [Holders()] * len(targets)

    def store(place: int, paths: list[HolderPath]) -> None:
        found[place] = _describe_or_fail(paths)

    find_paths(targets, Roots() if roots is None else roots, deadline, store)
    return found


def find_holders_forward(
    targets: list[object], roots: Roots, is_over: Callable[[], bool]
) -> list[Holders | None]:
    """Do the same by a forward search, without asking the whole heap; None for those not reached.

    Args:
        targets: As above.
        roots: Where a path may end, made with the values to start from.
        is_over: Whether to stop.
    """
    found: list[Holders | None] = [None] * len(targets)

    def store(place: int, paths: list[HolderPath]) -> None:
        found[place] = _describe_or_fail(paths)

    find_paths_forward(targets, roots, is_over, store)
    return found


def _describe_or_fail(paths: list[HolderPath]) -> Holders:
    try:
        return _describe(paths)
    except Exception:
        # An object has changed while it was described. The others are described all the same.
        return Holders(has_failed=True)


def _describe(paths: list[HolderPath]) -> Holders:
    best = [path for path in paths if path.rank == paths[0].rank]
    sentences = dict.fromkeys([*map(sentence_of, best), *threads_using(paths)])
    owners = dict.fromkeys(owner for path in paths for owner in owners_of(path))
    return Holders(tuple(sentences), tuple(owners))
