"""What every thread and greenlet has in its local variables, and where it is now."""

from __future__ import annotations

from functools import lru_cache
from pathlib import PurePath
from threading import get_ident
from types import CodeType, FrameType
from typing import Any, NamedTuple

from closewait_guard._capture import threads
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
    "call_of",
    "call_place",
    "calls_of",
    "current_calls",
    "running_locals",
    "thread_name",
    "where",
]


# Bounds the time that a process with thousands of threads takes.
_MOST_FRAMES = 5000
_MOST_CALLS = 200

_GREENLET, _GEVENT = "greenlet:greenlet", "gevent:Greenlet"


class Local(NamedTuple):
    """A variable of a call that is under way. Plain data: it keeps nothing alive."""

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
        """Whether the program's own code is called."""
        return _kind_of(self.filename) is FrameKind.USER


def call_place(call: Call) -> str:
    """`prices.py:88 in wait()`, with the folder that the file lies in."""
    path = PurePath(call.filename)
    folder = path.parent.name
    where = f"{folder}/{path.name}" if folder and not call.filename.startswith("<") else path.name
    return f"{where}:{call.lineno} in {call.function}()".replace(">()", ">")


def where(calls: list[Call]) -> str:
    """Where a stack is now: the program's innermost line, and what it has called there."""
    user = next((call for call in calls if call.is_user), None)
    if not calls or user is None:
        return call_place(calls[0]) if calls else "an unknown place"
    inside = "" if user is calls[0] else f", inside {calls[0].function}()".replace(">()", ">")
    return call_place(user) + inside


def calls_of(frame: FrameType | None) -> list[Call]:
    """The calls of a stack, innermost first, without the guard's own."""
    calls: list[Call] = []
    while frame is not None and len(calls) < _MOST_CALLS:
        code = frame.f_code
        if not is_ours(text_of(code.co_filename) or ""):
            calls.append(call_of(code, frame.f_lineno))
        frame = frame.f_back
    return calls


def call_of(code: CodeType, lineno: int | None) -> Call:
    """A call of a function, at a line."""
    return Call(text_of(code.co_qualname) or "", text_of(code.co_filename) or "", lineno or 0)


def current_calls(thread: int) -> list[Call]:
    """What a thread is doing at this moment."""
    return calls_of(running_frames().get(thread))


def running_locals(
    values: tuple[list[object], list[object]] | None = None,
) -> dict[int, Local]:
    """By the identity of the value: the variables of all calls that are under way.

    Where several have the same value, the program's own come before a library's, and inner calls
    before outer ones.

    Args:
        values: Where to put the values of own calls, and those of calls into libraries.
    """
    found: dict[int, Local] = {}
    left = _MOST_FRAMES
    for ident, frame in running_frames().items():
        runner = f"thread {thread_name(ident)}"
        left -= _take(frame, runner, ident, found, left, values)
    # Where the heap is too large for it, they are met on the way only.
    for greenlet, frame in _greenlets() if values is None else ():
        left -= _take(frame, greenlet_name(greenlet), None, found, left, values)
    return found


def thread_name(ident: int) -> str:
    """The name of a thread; its number where Python has not started it."""
    thread = threads.get(ident)
    name = None if thread is None else text_of(field(thread, "_name"))
    return str(ident) if name is None else name


def greenlet_name(greenlet: Any) -> str:
    """What gevent calls it, or its address."""
    name = text_of(field(greenlet, "name"))
    if name is None and is_exactly(greenlet, find_classes([_GEVENT]).values()):
        name = text_of(greenlet.name)  # Of the library's own class, which makes a name up.
    return f"greenlet {hex(id(greenlet)) if name is None else name}"


def _greenlets() -> list[tuple[Any, FrameType]]:
    """The suspended ones: their frames belong to no thread."""
    return [
        (greenlet, frame)
        for cls in find_classes([_GREENLET]).values()
        for greenlet in instances_of(kinds_of(cls))
        if (frame := native_field(greenlet, cls, "gr_frame")) is not None
    ]


def _take(
    frame: FrameType | None,
    runner: str,
    thread: int | None,
    found: dict[int, Local],
    most: int,
    values: tuple[list[object], list[object]] | None,
) -> int:
    is_own = thread in (None, get_ident())
    read, count = (locals_of if is_own else locals_of_other_thread), 0
    while frame is not None and count < most:
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
