"""Backwards from some objects to what holds them: one pass over the heap a level, for all at once.

Asking the interpreter costs the same for twenty objects as for one, so that all paths grow
together, each to its shortest end, until the time is up.


From what the program has by name to what it holds: where the heap is too large to be asked.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from itertools import islice
from operator import attrgetter
from types import (
    AsyncGeneratorType,
    CodeType,
    CoroutineType,
    FrameType,
    GeneratorType,
    TracebackType,
)
from typing import Any, NamedTuple

from closewait_guard._clock import now
from closewait_guard._holders.roots import FALLBACK, FOREIGN, OWN, Root, Roots
from closewait_guard._inspect import is_ours
from closewait_guard._live import Walk, is_exactly, referrers, referrers_through_tuples, text_of

__all__ = [
    "HolderPath",
    "code_of_call",
    "instances_reached",
    "paths",
    "paths_forward",
]


_MOST_LEVELS = 18
# The interpreter compares each reference of the heap with every object that it is asked about.
_MOST_AT_ONCE = 80
_MOST_ENDS = 3
# For how many more levels a better end is looked for.
_PATIENCE = {OWN: 0, FOREIGN: 2, FALLBACK: 5}


def code_of_call(thing: Any) -> CodeType | None:
    """The code of a frame, generator or coroutine."""
    for kind, read in _CODES:
        if type(thing) is kind:
            code: CodeType = read(thing)
            return code
    return None


_CODES = (
    (FrameType, attrgetter("f_code")),
    (GeneratorType, attrgetter("gi_code")),
    (CoroutineType, attrgetter("cr_code")),
    (AsyncGeneratorType, attrgetter("ag_code")),
)


# By the identity of an object: the targets that it leads to.
_Leading = dict[int, set[int]]


class HolderPath(NamedTuple):
    """From an end, or from the last object that was found, to the object that is held.

    Attributes:
        root: The end; None where there was none to be found.
        things: The objects, the outermost first. Only valid until `paths` goes on.
        is_unseen: Something that cannot be seen refers to the outermost object.
        is_cycle: Nothing but itself refers to any of what leads to the object.
    """

    root: Root | None
    things: tuple[object, ...]
    is_unseen: bool = False
    is_cycle: bool = False

    @property
    def rank(self) -> int | None:
        """That of the end."""
        return None if self.root is None else self.root.rank


class _Node:
    """An object, and by target the next one on the way to it."""

    __slots__ = ("level", "next", "thing")

    def __init__(self, thing: object, level: int) -> None:
        self.thing = thing
        self.level = level
        self.next: dict[int, _Node | None] = {}

    def is_of_traceback(self) -> bool:
        return is_exactly(self.thing, (FrameType, TracebackType))


class _Search:
    def __init__(self, targets: list[object], roots: Roots, deadline: float) -> None:
        # First of all: a collection would take the cycle of a target apart, if nothing but the
        # target were held.
        self._nearest = [referrers(tuple(targets))]
        self._roots = roots
        self._deadline = deadline
        self._nodes = {id(thing): _Node(thing, 0) for thing in targets}
        self._ignored = {id(targets)}
        self._targets = list(self._nodes)
        self._ends: dict[int, list[tuple[int, int, Root, _Node]]] = {key: [] for key in self._nodes}
        self._last_level = dict.fromkeys(self._nodes, _MOST_LEVELS)
        self._cut_short: set[int] = set()
        for key, node in self._nodes.items():
            node.next[key] = None

    def run(self) -> None:
        frontier = self._rooted({key: {key} for key in self._targets}, 0)
        # The targets too: beside what leads nowhere, a tuple may hold one.
        dead_ends: _Leading = {key: {key} for key in self._targets}
        for level in range(1, _MOST_LEVELS):
            frontier = self._still_wanted(frontier, level)
            if not frontier or now() > self._deadline:
                break
            found = self._linked(self._holding(frontier), frontier, level)
            reached = set().union(*found.values())
            for key, targets in frontier.items():
                if not targets <= reached:
                    dead_ends[key] = dead_ends.get(key, set()) | targets
            frontier = self._rooted(found, level)
            stuck = self._stuck(frontier)
            if stuck:
                beyond = {key: still for key, led in dead_ends.items() if (still := led & stuck)}
                dead_ends = {key: led for key, led in dead_ends.items() if key not in beyond}
                frontier |= self._rooted(self._beyond_tuples(beyond, level), level)
        self._cut_short.update(*frontier.values())

    def _holding(self, leading: _Leading) -> list[object]:
        return self._nearest.pop() if self._nearest else referrers(self._things(leading))

    def _things(self, leading: _Leading) -> tuple[object, ...]:
        # A list would be one more thing that refers to them.
        return tuple([self._nodes[key].thing for key in leading])

    def _stuck(self, frontier: _Leading) -> set[int]:
        """The targets for which there is no end yet, and nothing more to look at."""
        ended = {key for key, ends in self._ends.items() if any(end[0] != FALLBACK for end in ends)}
        return set(self._targets) - ended - set().union(*frontier.values())

    def _beyond_tuples(self, dead_ends: _Leading, level: int) -> _Leading:
        """What holds dead ends by way of tuples; few at a time, for it takes two passes."""
        some = dict(islice(dead_ends.items(), _MOST_AT_ONCE))
        if not some or now() > self._deadline:
            return {}
        return self._linked(referrers_through_tuples(self._things(some)), some, level)

    def _still_wanted(self, frontier: _Leading, level: int) -> _Leading:
        wanted: _Leading = {}
        for key, targets in frontier.items():
            still = {target for target in targets if self._last_level[target] >= level}
            if still and len(wanted) == _MOST_AT_ONCE:
                self._cut_short |= still
            elif still:
                wanted[key] = still
        return wanted

    def _linked(self, things: list[object], frontier: _Leading, level: int) -> _Leading:
        """Those of some objects that lead to the frontier, each with the targets newly reached."""
        found: _Leading = {}
        for thing in things:
            if self._is_internal(thing):
                continue
            referents = gc.get_referents(thing)
            gained = self._gained(thing, frontier.keys() & set(map(id, referents)), frontier, level)
            for each in referents:
                # What an object refers to is a finished tuple.
                if type(each) is tuple and (inner := frontier.keys() & set(map(id, each))):
                    through = self._gained(each, inner, frontier, level)
                    gained |= self._gained(thing, {id(each)}, {id(each): through}, level)
            if gained:
                found[id(thing)] = gained
        return found

    def _gained(
        self, thing: object, children: Set[int], frontier: _Leading, level: int
    ) -> set[int]:
        """Note the way from an object to each target that it did not lead to before."""
        gained: set[int] = set()
        for child in children:
            node = self._nodes.setdefault(id(thing), _Node(thing, level))
            for target in frontier[child] - node.next.keys():
                node.next[target] = self._nodes[child]
                gained.add(target)
        return gained

    def _is_internal(self, thing: object) -> bool:
        if type(thing) is _Node or id(thing) in self._ignored:
            return True
        code = code_of_call(thing)
        return code is not None and is_ours(text_of(code.co_filename) or "")

    def _rooted(self, found: _Leading, level: int) -> _Leading:
        """Note the ends; what is not one is looked at further."""
        further: _Leading = {}
        for key, targets in found.items():
            node = self._nodes[key]
            root = self._roots.of(node.thing)
            if root is None:
                further[key] = targets
                continue
            for target in targets:
                self._ends[target].append((root.rank, level, root, node))
                last = level + _PATIENCE[root.rank]
                self._last_level[target] = min(self._last_level[target], last)
            if not root.is_barrier:
                further[key] = targets
        return further

    def paths(self, target: int) -> list[HolderPath]:
        """The best ways that were found to one object."""
        ends = sorted(self._ends[target], key=lambda end: end[:2])
        if ends:
            best = [end for end in ends if end[0] == ends[0][0]][:_MOST_ENDS]
            best += [end for end in ends if end[2].thread is not None and end not in best][:1]
            return [HolderPath(root, self._way(node, target)) for _, _, root, node in best]
        leading = [node for node in self._nodes.values() if target in node.next]
        held = [] if target in self._cut_short else self._held_unseen(leading)
        if held or target in self._cut_short:
            outermost = held[0] if held else max(leading, key=lambda node: node.level)
            return [HolderPath(None, self._way(outermost, target), is_unseen=bool(held))]
        farthest = max(leading, key=lambda node: (node.is_of_traceback(), node.level))
        return [HolderPath(None, self._way(farthest, target), is_cycle=True)]

    def _way(self, node: _Node | None, target: int) -> tuple[object, ...]:
        things: list[object] = []
        while node is not None:
            things.append(node.thing)
            node = node.next[target]
        return tuple(things)

    def _held_unseen(self, leading: list[_Node]) -> list[_Node]:
        """Those to which more refers than the collector knows: native code, or a running call."""
        wanted = {id(node.thing) for node in leading}
        known = Counter(
            key
            for node in leading
            for key in map(id, gc.get_referents(node.thing))
            if key in wanted
        )
        # Our own: the node, the argument, and the list of targets.
        return [
            node
            for node in leading
            if sys.getrefcount(node.thing) > 2 + (node.level == 0) + known[id(node.thing)]
        ]

    def close(self) -> None:
        """Let go of everything."""
        for node in self._nodes.values():
            node.thing = None
            node.next.clear()
        for ends in self._ends.values():
            ends.clear()


def paths(
    targets: list[object],
    roots: Roots,
    deadline: float,
    tell: Callable[[int, list[HolderPath]], None],
) -> None:
    """Find the shortest meaningful paths to each of some objects, and tell them, by its place.

    Args:
        targets: What is held. The caller keeps no other list of them, and finds it empty.
        roots: What counts as an end.
        deadline: The monotonic time after which no further level is begun.
        tell: Called with the paths of each; what it keeps of the objects stays alive.
    """
    search = _Search(targets, roots, deadline)
    try:
        search.run()
        for place in range(len(targets)):
            tell(place, search.paths(id(targets[place])))
    finally:
        # First the targets, while what refers to them is held: a cycle stays whole.
        targets.clear()
        search.close()


# How much farther out a better end may be.
_PATIENCE = {OWN: 0, FOREIGN: 2, FALLBACK: 5}


def paths_forward(
    targets: list[object],
    roots: Roots,
    is_over: Callable[[], bool],
    tell: Callable[[int, list[HolderPath]], None],
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
    code = code_of_call(thing)
    return code is not None and is_ours(text_of(code.co_filename) or "")


def _path(way: list[object], roots: Roots) -> HolderPath:
    """What lies between the best end and the object that was reached."""
    best: tuple[int, Root] | None = None
    for number, thing in enumerate(way):
        if best is not None and number > best[0] + _PATIENCE[best[1].rank]:
            break
        root = roots.of(thing)
        if root is not None and (best is None or root.rank < best[1].rank):
            best = number, root
    if best is None:
        return HolderPath(None, tuple(reversed(way)))
    return HolderPath(best[1], tuple(reversed(way[: best[0] + 1])))
