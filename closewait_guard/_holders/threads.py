"""The local variables of all running threads and greenlets, and the calls that they are in."""

from __future__ import annotations

from functools import lru_cache
from pathlib import PurePath
from threading import get_ident
from types import CodeType, FrameType
from typing import Any, NamedTuple

from closewait_guard._cpython import THREAD_NAME, threads
from closewait_guard._inspect import is_ours, kind_of
from closewait_guard._live import (
    field,
    find_classes,
    instances_of,
    is_exactly,
    kinds_of,
    locals_of,
    locals_of_other_thread,
    native_field,
    running_frames,
    text_of,
)
from closewait_guard.model import FrameKind

__all__ = [
    "Call",
    "Local",
    "calls_of",
    "current_calls",
    "describe_call",
    "describe_calls",
    "make_call",
    "running_locals",
    "thread_name",
]


# Bounds the time that a process with thousands of threads takes.
_MAX_FRAMES = 5000
_MAX_CALLS = 200

_GREENLET, _GEVENT = "greenlet:greenlet", "gevent:Greenlet"


class Local(NamedTuple):
    """A local variable of a running call. Plain data: it keeps nothing alive."""

    is_library: bool
    name: str
    function: str
    runner: str
    thread: int | None


class Call(NamedTuple):
    """One call of a stack."""

    function: str
    filename: str
    lineno: int

    @property
    def is_user(self) -> bool:
        """Whether it is a call of the program's own code."""
        return _kind_of(self.filename) is FrameKind.USER


def describe_call(call: Call) -> str:
    """Describe a call as `shop/prices.py:88 in wait()`."""
    path = PurePath(call.filename)
    folder = path.parent.name
    describe_calls = (
        f"{folder}/{path.name}" if folder and not call.filename.startswith("<") else path.name
    )
    return f"{describe_calls}:{call.lineno} in {call.function}()".replace(">()", ">")


def describe_calls(calls: list[Call]) -> str:
    """Describe where a stack is now: the program's innermost line, and what it has called there."""
    user = next((call for call in calls if call.is_user), None)
    if not calls or user is None:
        return describe_call(calls[0]) if calls else "an unknown place"
    inside = "" if user is calls[0] else f", inside {calls[0].function}()".replace(">()", ">")
    return describe_call(user) + inside


def calls_of(frame: FrameType | None) -> list[Call]:
    """The calls of a stack, innermost first, without the guard's own."""
    calls: list[Call] = []
    while frame is not None and len(calls) < _MAX_CALLS:
        code = frame.f_code
        if not is_ours(text_of(code.co_filename) or ""):
            calls.append(make_call(code, frame.f_lineno))
        frame = frame.f_back
    return calls


def make_call(code: CodeType, lineno: int | None) -> Call:
    """Make a Call of a code object and a line."""
    return Call(text_of(code.co_qualname) or "", text_of(code.co_filename) or "", lineno or 0)


def current_calls(thread: int) -> list[Call]:
    """The calls that a thread is in now, innermost first."""
    return calls_of(running_frames().get(thread))


def running_locals(
    values: tuple[list[object], list[object]] | None = None,
) -> dict[int, Local]:
    """By the identity of the value: the variables of all running calls.

    If several have the same value, the program's own take precedence over a library's, and inner
    calls over outer ones.

    Args:
        values: Two lists to add values to: those in own calls, and those in calls of libraries.
    """
    found: dict[int, Local] = {}
    remaining = _MAX_FRAMES
    for ident, frame in running_frames().items():
        runner = f"thread {thread_name(ident)}"
        remaining -= _collect_locals(frame, runner, ident, found, remaining, values)
    # If the heap is too large to search for greenlets, the walk finds those that it reaches.
    for greenlet, frame in _greenlets() if values is None else ():
        remaining -= _collect_locals(frame, greenlet_name(greenlet), None, found, remaining, values)
    return found


def thread_name(ident: int) -> str:
    """The name of a thread, or its number if Python has not started it."""
    thread = threads.get(ident)
    name = None if thread is None else text_of(field(thread, THREAD_NAME))
    return str(ident) if name is None else name


def greenlet_name(greenlet: Any) -> str:
    """The name that gevent gives it, or its address."""
    name = text_of(field(greenlet, "name"))
    if name is None and is_exactly(greenlet, find_classes([_GEVENT]).values()):
        name = text_of(greenlet.name)  # gevent's own class makes up a name.
    return f"greenlet {hex(id(greenlet)) if name is None else name}"


def _greenlets() -> list[tuple[Any, FrameType]]:
    """The suspended greenlets, whose frames belong to no thread."""
    return [
        (greenlet, frame)
        for cls in find_classes([_GREENLET]).values()
        for greenlet in instances_of(kinds_of(cls))
        if (frame := native_field(greenlet, cls, "gr_frame")) is not None
    ]


def _collect_locals(
    frame: FrameType | None,
    runner: str,
    thread: int | None,
    found: dict[int, Local],
    limit: int,
    values: tuple[list[object], list[object]] | None,
) -> int:
    is_own = thread in (None, get_ident())
    read, count = (locals_of if is_own else locals_of_other_thread), 0
    while frame is not None and count < limit:
        code = frame.f_code
        filename = text_of(code.co_filename) or ""
        if not is_ours(filename):
            is_library = _kind_of(filename) is not FrameKind.USER
            function = text_of(code.co_qualname) or ""
            variables = read(frame)
            if values is not None:
                values[is_library].extend(variables.values())
            for name, value in variables.items():
                known = found.get(id(value))
                if known is None or (known.is_library and not is_library):
                    found[id(value)] = Local(is_library, name, function, runner, thread)
        frame = frame.f_back
        count += 1
    return count


@lru_cache(4096)
def _kind_of(filename: str) -> FrameKind:
    return kind_of(filename)
