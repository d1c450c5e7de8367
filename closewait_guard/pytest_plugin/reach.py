"""Is a socket kept by this object? Walks forward from it, bounded in count and time."""

from __future__ import annotations

import gc
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from closewait_guard._clock import now

__all__ = ["reached"]

_MOST_OBJECTS = 200_000
_MOST_SECONDS = 0.5
_LOOK_AT_THE_CLOCK = 1024

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
    loops = _loop_classes()
    deadline = now() + _MOST_SECONDS
    for count in range(_MOST_OBJECTS):
        if not queue or (count % _LOOK_AT_THE_CLOCK == 0 and now() > deadline):
            return
        thing = queue.popleft()
        yield thing
        for further in _beyond(thing, loops):
            if id(further) not in visited:
                visited.add(id(further))
                queue.append(further)


def _beyond(thing: object, loops: tuple[type, ...]) -> Iterable[object]:
    kind = type(thing)
    if issubclass(kind, _DEAD_ENDS) or str(kind.__module__).partition(".")[0] in _FOREIGN:
        return ()
    if issubclass(kind, loops):
        return _self_pipe(thing)
    if kind is types.FunctionType:
        return (thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__)  # type: ignore[attr-defined]
    if kind is dict and "__builtins__" in thing:  # type: ignore[operator]
        # A module's globals.
        return ()
    return gc.get_referents(thing)


def _self_pipe(loop: object) -> Iterable[object]:
    return (getattr(loop, "_ssock", None), getattr(loop, "_csock", None))


def _loop_classes() -> tuple[type, ...]:
    """Event loops, and the selectors in which they keep everybody's sockets."""
    found: list[Any] = []
    for module, name in (("asyncio", "AbstractEventLoop"), ("selectors", "BaseSelector")):
        cls = getattr(sys.modules.get(module), name, None)
        found += [cls] if cls is not None else []
    return tuple(found)
