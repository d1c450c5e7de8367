"""Search for reference paths between objects and their holders, backward or forward.

The backward search goes from all objects at once to their referrers, one pass over the heap a
level, because gc.get_referrers costs the same for twenty objects as for one. The forward search
goes from modules and local variables to what they refer to, if the heap is too large for that.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Set
from contextlib import closing
from itertools import chain
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
from closewait_guard._live import (
    Walk,
    is_exactly,
    referrers,
    referrers_through_tuples,
    shows_other_threads,
    text_of,
)
from closewait_guard._threads import get_ident

__all__ = [
    "HolderPath",
    "code_of_call",
    "find_paths",
    "find_paths_forward",
    "find_unused",
    "reachable_instances",
]


# From a socket of urllib3 to the variable with the requests.Session, where each object has a dict.
_MAX_LEVELS = 24
# gc.get_referrers compares each reference of the heap with every object that it is given.
_MAX_AT_ONCE = 80
_MAX_ENDS = 3
# For how many more levels to look for a better end.
_EXTRA_LEVELS = {OWN: 0, FOREIGN: 2, FALLBACK: 12}


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
_TargetsByNode = dict[int, set[int]]


class HolderPath(NamedTuple):
    """From an end, or from the last object that was found, to the object that is held.

    Attributes:
        root: The end; None if none was found.
        things: The objects, the outermost first. Only valid during the call of `on_found`.
        is_held_by_unseen: Something that the collector cannot see refers to the outermost object.
        is_cycle: Nothing outside refers to any of the objects that lead to the target.
    """

    root: Root | None
    things: tuple[object, ...]
    is_held_by_unseen: bool = False
    is_cycle: bool = False

    @property
    def rank(self) -> int | None:
        """The rank of the end."""
        return None if self.root is None else self.root.rank


def _merge(known: _TargetsByNode, more: _TargetsByNode) -> None:
    for key, targets in more.items():
        known[key] = known.get(key, set()) | targets


class _Node:
    """An object, and by target the next one on the path to it."""

    __slots__ = ("level", "next", "thing")

    def __init__(self, thing: object, level: int) -> None:
        self.thing = thing
        self.level = level
        self.next: dict[int, _Node | None] = {}

    def is_of_traceback(self) -> bool:
        return is_exactly(self.thing, (FrameType, TracebackType))


class _Search:
    def __init__(
        self,
        targets: list[object],
        roots: Roots,
        deadline: float,
        passive: Collection[type] = (),
    ) -> None:
        # Before anything else: as long as only the target is held, a garbage collection would
        # break up a cycle that it is in.
        self._nearest = [referrers(tuple(targets))]
        self._roots = roots
        self._deadline = deadline
        self._passive = passive
        self._passive_things: dict[int, object] = {}
        self._nodes = {id(thing): _Node(thing, 0) for thing in targets}
        self._ignored = {id(targets)}
        self._targets = list(self._nodes)
        self._ends: dict[int, list[tuple[int, int, Root, _Node]]] = {key: [] for key in self._nodes}
        self._last_level = dict.fromkeys(self._nodes, _MAX_LEVELS)
        self._cut_short: set[int] = set()
        for key, node in self._nodes.items():
            node.next[key] = None

    def run(self) -> None:
        frontier = self._note_ends({key: {key} for key in self._targets}, 0)
        # Whose referrers were searched, but for tuples. Those too that lead on: a tuple may hold
        # one beside referrers that nothing holds.
        passed: _TargetsByNode = {key: {key} for key in self._targets}
        for level in range(1, _MAX_LEVELS):
            frontier = self._choose_wanted(frontier, level)
            if not frontier or now() > self._deadline:
                break
            found = self._find_links(self._find_referrers(frontier), frontier, level)
            _merge(passed, frontier)
            frontier = self._note_ends(found, level)
            stuck = self._stuck_targets(frontier)
            if stuck:
                beyond = {key: still for key, led in passed.items() if (still := led & stuck)}
                passed = {key: led for key, led in passed.items() if key not in beyond}
                found = self._look_through_tuples(beyond, level)
                _merge(frontier, self._note_ends(found, level))
        self._cut_short.update(*frontier.values())

    def _find_referrers(self, leading: _TargetsByNode) -> list[object]:
        return self._nearest.pop() if self._nearest else referrers(self._things(leading))

    def _things(self, leading: _TargetsByNode) -> tuple[object, ...]:
        # Not a list, which would be one more referrer.
        return tuple([self._nodes[key].thing for key in leading])

    def _stuck_targets(self, frontier: _TargetsByNode) -> set[int]:
        """The targets without an end, and without a node whose referrers are not yet known."""
        ended = {key for key, ends in self._ends.items() if any(end[0] != FALLBACK for end in ends)}
        return set(self._targets) - ended - set().union(*frontier.values())

    def _look_through_tuples(self, passed: _TargetsByNode, level: int) -> _TargetsByNode:
        """What holds these through tuples: some at a time, the outermost first."""
        found: _TargetsByNode = {}
        left = list(reversed(passed.items()))
        while left and now() <= self._deadline:
            some, left = dict(left[:_MAX_AT_ONCE]), left[_MAX_AT_ONCE:]
            things = referrers_through_tuples(self._things(some))
            _merge(found, self._find_links(things, some, level))
        self._cut_short.update(*(targets for _, targets in left))
        return found

    def _choose_wanted(self, frontier: _TargetsByNode, level: int) -> _TargetsByNode:
        wanted: _TargetsByNode = {}
        for key, targets in frontier.items():
            still = {target for target in targets if self._last_level[target] >= level}
            if still and len(wanted) == _MAX_AT_ONCE:
                self._cut_short |= still
            elif still:
                wanted[key] = still
        return wanted

    def _find_links(
        self, things: list[object], frontier: _TargetsByNode, level: int
    ) -> _TargetsByNode:
        """Link objects to the frontier; return those that lead to further targets, with these."""
        found: _TargetsByNode = {}
        for thing in things:
            if self._is_internal(thing):
                continue
            if is_exactly(thing, self._passive):
                self._passive_things[id(thing)] = thing
                continue
            referents = gc.get_referents(thing)
            gained = self._link(thing, frontier.keys() & set(map(id, referents)), frontier, level)
            for each in referents:
                # A tuple that an object refers to is complete.
                if type(each) is tuple and (inner := frontier.keys() & set(map(id, each))):
                    through = self._link(each, inner, frontier, level)
                    gained |= self._link(thing, {id(each)}, {id(each): through}, level)
            if gained:
                found[id(thing)] = gained
        return found

    def _link(
        self, thing: object, children: Set[int], frontier: _TargetsByNode, level: int
    ) -> set[int]:
        """Note the path from an object to each target that it did not lead to before."""
        gained: set[int] = set()
        for child in children:
            node = self._nodes.setdefault(id(thing), _Node(thing, level))
            for target in frontier[child] - node.next.keys():
                node.next[target] = self._nodes[child]
                gained.add(target)
        return gained

    def _is_internal(self, thing: object) -> bool:
        return type(thing) is _Node or id(thing) in self._ignored or _is_ours(thing)

    def _note_ends(self, found: _TargetsByNode, level: int) -> _TargetsByNode:
        """Note the ends among the nodes; return those whose referrers are to be searched."""
        further: _TargetsByNode = {}
        for key, targets in found.items():
            node = self._nodes[key]
            root = self._roots.of(node.thing)
            if root is None:
                further[key] = targets
                continue
            for target in targets:
                self._ends[target].append((root.rank, level, root, node))
                last = level + _EXTRA_LEVELS[root.rank]
                self._last_level[target] = min(self._last_level[target], last)
            passing = targets & root.parts if root.is_barrier else targets
            if passing:
                further[key] = passing
        return further

    def paths(self, target: int) -> list[HolderPath]:
        """The best paths that were found to one object."""
        ends = sorted(self._ends[target], key=lambda end: end[:2])
        if ends:
            best = [end for end in ends if end[0] == ends[0][0]][:_MAX_ENDS]
            best += [end for end in ends if end[2].thread is not None and end not in best][:1]
            return [HolderPath(root, self._path_from(node, target)) for _, _, root, node in best]
        leading = [node for node in self._nodes.values() if target in node.next]
        held = [] if target in self._cut_short else self._nodes_held_by_unseen(leading)
        if held or target in self._cut_short:
            outermost = held[0] if held else max(leading, key=lambda node: node.level)
            return [
                HolderPath(None, self._path_from(outermost, target), is_held_by_unseen=bool(held))
            ]
        farthest = max(leading, key=lambda node: (node.is_of_traceback(), node.level))
        return [HolderPath(None, self._path_from(farthest, target), is_cycle=True)]

    def _path_from(self, node: _Node | None, target: int) -> tuple[object, ...]:
        things: list[object] = []
        while node is not None:
            things.append(node.thing)
            node = node.next[target]
        return tuple(things)

    def _nodes_held_by_unseen(self, leading: list[_Node]) -> list[_Node]:
        """Nodes with more references than the collector sees: by native code, or a running call."""
        wanted = {id(node.thing) for node in leading}
        seen = chain((node.thing for node in leading), self._passive_things.values())
        known = Counter(
            key for thing in seen for key in map(id, gc.get_referents(thing)) if key in wanted
        )
        # Our own references: the node, the argument, and the list of targets.
        return [
            node
            for node in leading
            if sys.getrefcount(node.thing) > 2 + (node.level == 0) + known[id(node.thing)]
        ]

    def is_unused(self, target: int) -> bool | None:
        """Whether only garbage and passive objects lead to a target; None if that is not known."""
        return None if self._is_unfinished(target) else self.paths(target)[0].is_cycle

    def is_in_no_other_thread(self, target: int) -> bool | None:
        """Whether no running call of another thread leads to it, nor may do so unseen."""
        threads = {root.thread for _, _, root, _ in self._ends[target]} - {None}
        if threads - {get_ident()}:
            return False
        if self._is_unfinished(target):
            return None
        if threads or (shows_other_threads() and self._roots.has_all_calls):
            return True
        return not self.paths(target)[0].is_held_by_unseen

    def _is_unfinished(self, target: int) -> bool:
        return target in self._cut_short and not self._ends[target]

    def close(self) -> None:
        """Drop all references."""
        self._passive_things.clear()
        for node in self._nodes.values():
            node.thing = None
            node.next.clear()
        for ends in self._ends.values():
            ends.clear()


def find_paths(
    targets: list[object],
    roots: Roots,
    deadline: float,
    on_found: Callable[[int, list[HolderPath]], None],
) -> None:
    """Search backward for the shortest useful paths to each of some objects.

    Args:
        targets: What is held. The caller must have no other list of them; it is emptied.
        roots: Where a path may end.
        deadline: The monotonic time after which no further level is started.
        on_found: Called with the index and the paths of each target; objects that it keeps stay
            alive.
    """
    search = _Search(targets, roots, deadline)
    try:
        search.run()
        for place in range(len(targets)):
            on_found(place, search.paths(id(targets[place])))
    finally:
        # First the targets, while their referrers are held, so that cycles stay intact.
        targets.clear()
        search.close()


def find_unused(
    targets: list[object],
    roots: Roots,
    deadline: float,
    passive: Collection[type],
    kept_by: Collection[type],
) -> dict[int, bool | None]:
    """By the places of some objects, whether nothing can use them any more; None if not known.

    Only garbage leads to them then, or objects that have a reference which they do not use.

    Args:
        targets: The objects. The caller must have no other list of them; it is emptied.
        roots: Where a path may end.
        deadline: As above.
        passive: Classes of objects that do not use them.
        kept_by: Further ones, which excuse them nevertheless while a call of another thread has
            such an object: it is let go of when the call ends.
    """
    try:
        with closing(_Search(targets, roots, deadline, [*passive, *kept_by])) as search:
            search.run()
            unused = {key: search.is_unused(key) for key in map(id, targets)}
        if kept_by and any(unused.values()):
            with closing(_Search(targets, roots, deadline, passive)) as search:
                search.run()
                for key in (key for key, is_unused in unused.items() if is_unused):
                    unused[key] = search.is_in_no_other_thread(key)
        return {place: unused[key] for place, key in enumerate(map(id, targets))}
    finally:
        targets.clear()


def find_paths_forward(
    targets: list[object],
    roots: Roots,
    is_over: Callable[[], bool],
    on_found: Callable[[int, list[HolderPath]], None],
) -> None:
    """Search forward for one path to each of some objects.

    Args:
        targets: What is held; the list is emptied.
        roots: Where a path may end, and where to start.
        is_over: Whether to stop.
        on_found: Called with the index of a target that was reached, and its path.
    """
    wanted = {id(target): place for place, target in enumerate(targets)}
    walk = _start_walk(roots)
    try:
        for place in walk.run(is_over):
            number = wanted.get(id(walk.things[place]))
            if number is not None:
                del wanted[id(walk.things[place])]
                on_found(number, [_path_to_best_end(walk.way_to(place), roots)])
                if not wanted:
                    break
    finally:
        targets.clear()


def reachable_instances(
    classes: Mapping[int, type], roots: Roots, is_over: Callable[[], bool]
) -> tuple[list[object], bool]:
    """The objects of exactly some classes, given by identity, and whether that is all of them."""
    walk = _start_walk(roots)
    things = (walk.things[place] for place in walk.run(is_over))
    found = [thing for thing in things if id(type(thing)) in classes]
    return found, walk.has_reached_all


def _start_walk(roots: Roots) -> Walk:
    walk = Walk(_is_ours)
    own, foreign = roots.namespaces()
    values, of_libraries = roots.values
    walk.begin_with(own, values, of_libraries, foreign)
    return walk


def _is_ours(thing: object) -> bool:
    code = code_of_call(thing)
    return code is not None and is_ours(text_of(code.co_filename) or "")


def _path_to_best_end(way: list[object], roots: Roots) -> HolderPath:
    """The path from the best end to the object that was reached."""
    best: tuple[int, Root] | None = None
    for number, thing in enumerate(way):
        if best is not None and number > best[0] + _EXTRA_LEVELS[best[1].rank]:
            break
        root = roots.of(thing)
        if root is not None and (best is None or root.rank < best[1].rank):
            best = number, root
    if best is None:
        return HolderPath(None, tuple(reversed(way)))
    return HolderPath(best[1], tuple(reversed(way[: best[0] + 1])))
