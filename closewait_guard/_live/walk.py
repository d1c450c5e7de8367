"""Forward through the heap in small steps, between which other threads run.

The garbage collector answers questions about the whole heap in one call, for which all threads
stand still: 50 ms for five million objects. Where that is too long, what can be reached from some
beginnings is looked at object by object, as far as time allows.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from types import (
    AsyncGeneratorType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    ModuleType,
)
from typing import Any

from closewait_guard._cpython import has_gil
from closewait_guard._live.objects import derives_from

__all__ = [
    "Walk",
]


# Larger containers are gone through in several turns.
_CHUNK = 500
# Of each beginning in turn, so that one that leads to millions of objects holds up no other.
_TURN = 50
_MAX_THINGS = 200_000

_CONTAINERS: tuple[Any, ...] = (dict, list, tuple, set, frozenset, deque)
_CODED = (FrameType, GeneratorType, CoroutineType, AsyncGeneratorType)

_Children = Callable[[Any], Iterable[object]]
# The place of an object, and what of a large container is still to come.
_Rest = tuple[int, Iterator[object]]


class Walk:
    """What was reached, each object with the place of the one that it was reached from.

    Args:
        is_passed_by: Whether a frame, generator or coroutine is of no interest.
        without: Objects that are left out.
    """

    def __init__(
        self, is_passed_by: Callable[[object], bool], without: Iterable[object] = ()
    ) -> None:
        self.things: list[object] = []
        self.parents: list[int] = []
        self._seen = set(map(id, without))
        self._lanes: list[deque[int | _Rest]] = []
        self._is_passed_by = is_passed_by
        # The class is kept, so that its identity stays its own.
        self._kinds: dict[int, tuple[type, Any, _Children | None]] = {}

    def begin_with(self, *lanes: Iterable[object]) -> None:
        """Beginnings; each group of them has its turn as often as the others."""
        for things in lanes:
            lane: deque[int | _Rest] = deque()
            self._add(things, -1, lane)
            self._lanes.append(lane)

    def run(self, is_over: Callable[[], bool]) -> Iterator[int]:
        """The places of what is reached, in order, until it is over or there is no more."""
        yielded = 0
        if not has_gil():  # Other threads change what is looked at.
            return
        while any(self._lanes) and not is_over() and len(self.things) < _MAX_THINGS:
            for lane in self._lanes:
                for _ in range(min(_TURN, len(lane))):
                    self._expand(lane.popleft(), lane)
            yield from range(yielded, len(self.things))
            yielded = len(self.things)

    @property
    def has_reached_all(self) -> bool:
        """Whether it has ended because there is no more, and not by a limit."""
        return not any(self._lanes)

    def way_to(self, place: int) -> list[object]:
        """An object, what it was reached from, and so on to the beginning."""
        way = []
        while place >= 0:
            way.append(self.things[place])
            place = self.parents[place]
        return way

    def _add(self, children: Iterable[object], parent: int, lane: deque[int | _Rest]) -> None:
        seen = self._seen
        for child in filter(gc.is_tracked, children):
            if id(child) not in seen:
                seen.add(id(child))
                lane.append(len(self.things))
                self.things.append(child)
                self.parents.append(parent)

    def _expand(self, entry: int | _Rest, lane: deque[int | _Rest]) -> None:
        if type(entry) is int:
            self._add(self._children(entry, lane), entry, lane)
            return
        place, rest = entry  # type: ignore[misc]
        try:
            some = list(islice(rest, _CHUNK))
        except RuntimeError:  # It has changed meanwhile: the rest is left out.
            return
        self._add(some, place, lane)
        if len(some) == _CHUNK:
            lane.append(entry)

    def _children(self, place: int, lane: deque[int | _Rest]) -> Iterable[object]:
        thing: Any = self.things[place]
        container, children = self._look_up(type(thing))
        if container is not None and container.__len__(thing) > _CHUNK:
            every = chain.from_iterable(dict.items(thing)) if container is dict else None
            lane.append((place, container.__iter__(thing) if every is None else every))
            return ()
        return () if children is None else children(thing)

    def _look_up(self, kind: type) -> tuple[Any, _Children | None]:
        known = self._kinds.get(id(kind))
        if known is None:
            container = next((each for each in _CONTAINERS if derives_from(kind, [each])), None)
            known = self._kinds[id(kind)] = (kind, container, self._how(kind))
        return known[1:]

    def _how(self, kind: type) -> _Children | None:
        if derives_from(kind, [ModuleType, Walk]):
            return None
        if kind is FunctionType:
            return _of_function
        return self._of_coded if derives_from(kind, _CODED) else _of

    def _of_coded(self, thing: object) -> Iterable[object]:
        return () if self._is_passed_by(thing) else gc.get_referents(thing)


def _of(thing: object) -> Iterable[object]:
    return gc.get_referents(thing)


def _of_function(function: Any) -> Iterable[object]:
    # Its globals are those of a module, which is a beginning itself.
    return (
        *(function.__closure__ or ()),
        *(function.__defaults__ or ()),
        function.__kwdefaults__,
        function.__dict__,
    )
