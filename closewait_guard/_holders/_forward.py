"""From what the program has by name to what it holds: where the heap is too large to be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from closewait_guard._frames import is_ours
from closewait_guard._holders._roots import FALLBACK, FOREIGN, OWN, Root, Roots
from closewait_guard._holders._search import Path, code_of
from closewait_guard._objects import text_of
from closewait_guard._walk import Walk

__all__ = ["instances_reached", "paths_forward"]

# How much farther out a better end may be.
_PATIENCE = {OWN: 0, FOREIGN: 2, FALLBACK: 5}


def paths_forward(
    targets: list[object],
    roots: Roots,
    is_over: Callable[[], bool],
    tell: Callable[[int, list[Path]], None],
) -> None:
    """Tell one path to each object that is reached before it is over.

    Args:
        targets: What is held; empty afterwards.
        roots: What counts as an end, and what to begin with.
        is_over: Whether to stop.
        tell: Called with the place of an object and its path.
    """
    wanted = {id(target): place for place, target in enumerate(targets)}
    walk = _begun(roots)
    try:
        for place in walk.run(is_over):
            number = wanted.get(id(walk.things[place]))
            if number is not None:
                del wanted[id(walk.things[place])]
                tell(number, [_path(walk.way_to(place), roots)])
                if not wanted:
                    break
    finally:
        targets.clear()


def instances_reached(
    classes: Mapping[int, type], roots: Roots, is_over: Callable[[], bool]
) -> Iterator[object]:
    """The objects of exactly some classes, by their identity, that are reached in time."""
    walk = _begun(roots)
    for place in walk.run(is_over):
        if id(type(walk.things[place])) in classes:
            yield walk.things[place]


def _begun(roots: Roots) -> Walk:
    walk = Walk(_is_ours)
    own, foreign = roots.namespaces()
    values, of_libraries = roots.values
    walk.begin_with(own, values, of_libraries, foreign)
    return walk


def _is_ours(thing: object) -> bool:
    code = code_of(thing)
    return code is not None and is_ours(text_of(code.co_filename) or "")


def _path(way: list[object], roots: Roots) -> Path:
    """What lies between the best end and the object that was reached."""
    best: tuple[int, Root] | None = None
    for number, thing in enumerate(way):
        if best is not None and number > best[0] + _PATIENCE[best[1].rank]:
            break
        root = roots.of(thing)
        if root is not None and (best is None or root.rank < best[1].rank):
            best = number, root
    if best is None:
        return Path(None, tuple(reversed(way)))
    return Path(best[1], tuple(reversed(way[: best[0] + 1])))
