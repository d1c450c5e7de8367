"""Is a socket kept by this object? Walks forward from it, bounded in count and time."""

from __future__ import annotations

import gc
import itertools
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from closewait_guard._clock import now
from closewait_guard._objects import derives_from, field, find_classes, module_name

__all__ = ["reached"]

_MOST_OBJECTS = 200_000
_MOST_SECONDS = 0.5
_LOOK_AT_THE_CLOCK = 1024
_FIRST_NAMES = 100

# What leads to everything, or nowhere.
_DEAD_ENDS = (
    type,
    str,
    bytes,
    int,
    float,
    types.ModuleType,
    types.CodeType,
    types.FrameType,
    types.TracebackType,
    types.BuiltinFunctionType,
)
# Event loops, and the selectors in which they keep everybody's sockets.
_LOOPS = ("asyncio:AbstractEventLoop", "selectors:BaseSelector")
# pytest's objects lead from any fixture to the test that runs, and to what is the test's own.
_FOREIGN = ("_pytest", "pytest", "pluggy", "xdist", "pytest_asyncio", "closewait_guard")


def reached(roots: Iterable[object], targets: dict[int, int]) -> set[int]:
    """Which of the targets (by `id()` of the object, each with a key) can be reached: their keys.

    An event loop knows the sockets of everybody who uses it, so it keeps none but its own.
    """
    found: set[int] = set()
    for thing in _walk(roots):
        key = targets.get(id(thing))
        if key is not None:
            found.add(key)
            if len(found) == len(targets):
                break
    return found


def _walk(roots: Iterable[object]) -> Iterator[object]:
    queue = deque(roots)
    visited = {id(thing) for thing in queue}
    kinds = _Kinds()
    deadline = now() + _MOST_SECONDS
    for count in range(_MOST_OBJECTS):
        if not queue or (count % _LOOK_AT_THE_CLOCK == 0 and now() > deadline):
            return
        thing = queue.popleft()
        yield thing
        for further in _beyond(thing, kinds):
            if id(further) not in visited:
                visited.add(id(further))
                queue.append(further)


def _beyond(thing: Any, kinds: _Kinds) -> Iterable[object]:
    kind = type(thing)
    if kinds.is_dead_end(kind):
        return ()
    if kinds.is_loop(kind):
        return (field(thing, "_ssock"), field(thing, "_csock"))
    if kind is types.FunctionType:
        return (thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__)
    if kind is dict and _is_of_a_module(thing):
        return ()
    return gc.get_referents(thing)


class _Kinds:
    """What the classes met on one walk are, each looked at once."""

    def __init__(self) -> None:
        # The class is kept, so that its identity stays its own.
        self._known: dict[int, tuple[type, bool, bool]] = {}
        self._loops = list(find_classes(_LOOPS).values())

    def is_dead_end(self, kind: type) -> bool:
        return self._look(kind)[1]

    def is_loop(self, kind: type) -> bool:
        return self._look(kind)[2]

    def _look(self, kind: type) -> tuple[type, bool, bool]:
        known = self._known.get(id(kind))
        if known is None:
            is_foreign = (module_name(kind) or "").partition(".")[0] in _FOREIGN
            is_dead_end = is_foreign or derives_from(kind, _DEAD_ENDS)
            known = self._known[id(kind)] = (kind, is_dead_end, derives_from(kind, self._loops))
        return known


def _is_of_a_module(variables: dict[Any, Any]) -> bool:
    """Whether a dict holds globals: the import system, or `exec`, has set a name early on."""
    names = list(itertools.islice(variables, _FIRST_NAMES))
    return any(type(name) is str and name == "__builtins__" for name in names)
