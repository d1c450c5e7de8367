"""A path of references as one sentence, in which it reads as code."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable
from types import (
    AsyncGeneratorType,
    CellType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    MethodType,
    TracebackType,
)
from typing import Any

from closewait_guard._format import pluralize
from closewait_guard._holders.attributes import attribute_of, item_of
from closewait_guard._holders.references import HolderPath, code_of_call
from closewait_guard._holders.roots import FOREIGN, suspended_calls, suspension_of
from closewait_guard._holders.threads import call_of, call_place, current_calls, thread_name, where
from closewait_guard._inspect import kind_of
from closewait_guard._live import (
    attribute_dict,
    is_a,
    is_any_of,
    is_exactly,
    locals_of,
    text_of,
    type_name,
    type_qualname,
)
from closewait_guard.model import FrameKind

__all__ = [
    "owners_of",
    "sentence_of",
    "threads_using",
]


_MOST_STEPS = 12
_MOST_CALLS = 8
# From a variable to the socket: the connection or file that has it, and what wraps that.
_CLOSE = 3
_GENERATORS = (GeneratorType, AsyncGeneratorType)
_BY_TRACEBACK = ", kept by an exception's traceback"


def sentence_of(path: HolderPath) -> str:
    """Who holds the last object of a path, and how."""
    if path.rank == FOREIGN and (told := _from_own_call(path.things)):
        return told
    text = PathText(path)
    text.follow(path.things)
    parts = text.parts()
    if path.root is not None:
        told = path.root.told
        if not parts:
            return told.removesuffix(": {}").replace("{}", "")
        return ": ".join((told.replace("{}", parts[0], 1), *parts[1:]))
    body = ": ".join(parts) or text.expression
    if path.is_cycle:
        through = _cycle_of(path.things)
        body = body.removesuffix(_BY_TRACEBACK)
        return f"reference cycle {through}: {body}; nothing else holds it"
    if path.is_unseen:
        frozen = "what gc.freeze() hides, " if gc.get_freeze_count() else ""
        return f"{frozen}native code, or a call under way that has no name for it: {body}"
    return f"{body} (what holds that was not found in time)"


def _from_own_call(things: tuple[object, ...]) -> str:
    """From the program's own generator that waits: how a library keeps it is of no interest."""
    for number, thing in enumerate(things):
        code = code_of_call(thing) if is_exactly(thing, _GENERATORS) else None
        if code is not None and kind_of(text_of(code.co_filename) or "") is FrameKind.USER:
            text = PathText(HolderPath(None, things[number:]))
            text.follow(things[number:])
            return ": ".join(text.parts())
    return ""


def threads_using(paths: list[HolderPath]) -> list[str]:
    """What the other threads are doing that have the object in a variable, or close to one."""
    near = [path for path in paths if len(path.things) <= _CLOSE]
    threads = [path.root.thread for path in near if path.root is not None]
    others = {thread for thread in threads if thread not in (None, threading.get_ident())}
    return [told for thread in others if thread is not None and (told := _stack_of(thread))]


def _stack_of(thread: int) -> str | None:
    calls = current_calls(thread)
    own = [number for number, call in enumerate(calls) if call.is_user]
    # What has called the program's outermost own call is how threads begin.
    calls = calls[: own[-1] + 1] if own else calls
    told = ", ".join(call_place(call) for call in calls[:_MOST_CALLS])
    more = len(calls) - _MOST_CALLS
    rest = f" and {pluralize(more, 'more call')}" if more > 0 else ""
    return f"thread {thread_name(thread)}, whose calls now are {told}{rest}" if calls else None


def owners_of(path: HolderPath) -> tuple[str, ...]:
    """The types of the objects on a path, the outermost first."""
    return tuple(dict.fromkeys(type_name(thing) for thing in path.things))


def _cycle_of(things: tuple[object, ...]) -> str:
    if any(is_any_of(thing, (TracebackType, FrameType, BaseException)) for thing in things):
        return "through an exception's traceback"
    plain = (dict, list, tuple, CellType)
    names = dict.fromkeys(_short_name(thing) for thing in things if not is_exactly(thing, plain))
    return "of " + ", ".join(names)


def _short_name(thing: object) -> str:
    return type_qualname(type(thing))


class PathText:
    """Grows an expression along a path; begins a new one at each call whose variable is next."""

    def __init__(self, path: HolderPath) -> None:
        outermost = path.things[0]
        self.expression = path.root.expression if path.root else _short_name(outermost)
        self._is_rooted = path.root is not None
        self._steps: list[str] = []
        self._done: list[str] = []
        # The dict that holds the attributes of the object before, or a module's variables.
        self._attributes = outermost if path.root and path.root.is_namespace else None

    def parts(self) -> list[str]:
        """Expressions and calls, the outermost first."""
        return [*self._done, *([self._finished()] if self._steps else [])]

    def _finished(self) -> str:
        steps = self._steps
        if len(steps) > _MOST_STEPS:
            half = _MOST_STEPS // 2
            steps = [*steps[:half], "...", *steps[-half:]]
        return (self.expression + "".join(steps)).lstrip(".")

    def follow(self, things: tuple[object, ...]) -> None:
        """Take all the steps."""
        for number in range(len(things) - 1):
            parent, child = things[number], things[number + 1]
            tell = next((tell for kind, tell in _VARIABLES if type(parent) is kind), None)
            if tell is not None:
                self._enter(*tell(parent, things[number + 1 :]))
            elif not _is_silent(parent, child):
                self._step(parent, child)

    def _enter(self, name: str, call: str) -> None:
        """A variable of a call: what follows is told from there."""
        if name:
            # Where nobody knows what holds the call, nor does it matter what its object is.
            self._done += [self._finished()] if self._steps and self._is_rooted else []
            self._done.append(call)
            self.expression, self._steps = name, []

    def _step(self, parent: object, child: object) -> None:
        if parent is self._attributes:
            self._steps.append("." + (item_of(parent, child) or "?")[1:-1].strip("'"))
            return
        if is_a(parent, type) or attribute_dict(parent) is child:
            self._attributes = child
            return
        name = attribute_of(parent, child)
        step = f".{name}" if name is not None else item_of(parent, child)
        self._steps.append(step or f".<{_short_name(child)}>")


# What only leads on: the reader does not know that it is there.
_SILENT = (CellType, MethodType, TracebackType)
_CONTAINERS = (dict, list, tuple, set, deque)
_Told = tuple[str, str]


def _is_silent(parent: object, child: object) -> bool:
    is_closure = type(parent) is tuple and type(child) is CellType
    is_awaited = type(child) is CoroutineType and not is_exactly(parent, _CONTAINERS)
    return is_exactly(parent, _SILENT) or is_closure or is_awaited


def _variable(frame: FrameType | None, things: tuple[object, ...]) -> str:
    """The name that a frame has for the first of some things, or for what a cell there has."""
    wanted = things[1] if type(things[0]) is CellType and len(things) > 1 else things[0]
    names = locals_of(frame) if frame is not None else {}
    return next((name for name, value in names.items() if value is wanted), "")


def _of_frame(frame: Any, things: tuple[object, ...]) -> _Told:
    name = _variable(frame, things)
    call = call_of(frame.f_code, frame.f_lineno)
    return name, f"local {name!r} of {call_place(call)}{_BY_TRACEBACK}"


def _of_suspended(waiting: Any, things: tuple[object, ...]) -> _Told:
    frame, _ = suspension_of(waiting)
    name = _variable(frame, things)
    call = f"{text_of(waiting.__qualname__)}()".replace(">()", ">")
    if type(waiting) is CoroutineType:
        return name, f"local {name!r} of {call}"
    return name, f"local {name!r} of {call}, suspended at {where(suspended_calls(waiting))}"


def _of_function(function: Any, things: tuple[object, ...]) -> _Told:
    closure = function.__closure__ or ()
    cell = next((thing for thing in things if type(thing) is CellType), None)
    names = zip(function.__code__.co_freevars, closure, strict=True)
    name = next((name for name, each in names if each is cell), "")
    return name, f"variable {name!r} in the closure of {text_of(function.__qualname__)}()"


_VARIABLES: tuple[tuple[type, Callable[[Any, tuple[object, ...]], _Told]], ...] = (
    (FrameType, _of_frame),
    (CoroutineType, _of_suspended),
    (GeneratorType, _of_suspended),
    (AsyncGeneratorType, _of_suspended),
    (FunctionType, _of_function),
)
