"""The local variables of all running threads and greenlets, and the calls that they are in.

Also what such calls still do with a connection: handlers, slow readers, what blocks an event loop.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    FunctionType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Any, NamedTuple

from closewait_guard._capture import Registry
from closewait_guard._clock import TimeLimit
from closewait_guard._cpython import (
    FILE_SOCKET,
    LOOP_SELECTOR,
    SELECTOR_KEYS,
    THREAD_NAME,
    threads,
)
from closewait_guard._format import format_duration
from closewait_guard._inspect import is_ours, kind_of
from closewait_guard._judge import excusable_by_calls
from closewait_guard._live import (
    attribute_dict,
    elements_of,
    field,
    find_classes,
    instances_of,
    is_exactly,
    items_of,
    kinds_of,
    load_frame_copy,
    locals_of,
    locals_of_other_thread,
    native_field,
    number_of,
    running_frames,
    text_of,
    unnamed_values_of,
    value_at,
)
from closewait_guard._threads import get_ident
from closewait_guard.model import Finding, FrameKind, Observation, Origin, Verdict
from closewait_guard.settings import Settings

__all__ = [
    "Call",
    "CallUse",
    "Local",
    "RunningCalls",
    "RunningLocals",
    "calls_of",
    "current_calls",
    "describe_call",
    "describe_calls",
    "make_call",
    "running_locals",
    "thread_name",
]


load_frame_copy()

# Bounds the time that a process with thousands of threads takes. A report says when that is all.
_MAX_FRAMES = 5000
_TOO_MANY = f"there are more than {_MAX_FRAMES:,}"
_MAX_CALLS = 200
_MAX_WRAPPERS = 20

_GREENLET, _GEVENT = "greenlet:greenlet", "gevent:Greenlet"

# Where servers store the connection that they serve, and HTTP libraries the one that they read.
_WRAPPED = ("connection", "request", "socket", "sock", "channel", "raw", "_fp", "fp", FILE_SOCKET)
_EVENT_READ = 1
# By identity, the types of most variables, which wrap nothing.
_PLAIN = frozenset(
    id(each)
    for each in (
        *(NoneType, str, int, bool, float, bytes, dict, list, tuple, set, frozenset, type),
        *(FunctionType, BuiltinFunctionType, MethodType, ModuleType),
    )
)


class Local(NamedTuple):
    """A local variable of a running call. Plain data: it keeps nothing alive.

    Attributes:
        name: Empty where a call has a value without a variable.
    """

    is_library: bool
    name: str
    function: str
    runner: str
    thread: int | None


class RunningLocals(NamedTuple):
    """The variables of running calls, by the identity of the value; whether those are all."""

    by_identity: dict[int, Local]
    are_all: bool


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
    """Describe a call as `/srv/shop/prices.py:88 in wait()`, one of a library as `pool/wait.py:8`.

    A report shows the paths of the program's own files relative to the reader's directory.
    """
    file = call.filename
    if not call.is_user and not file.startswith("<"):
        folders, name = os.path.split(file)
        folder = os.path.basename(folders)  # noqa: PTH119 - pathlib is slow to load
        file = f"{folder}/{name}" if folder else name
    return f"{file}:{call.lineno} in {call.function}()".replace(">()", ">")


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
) -> RunningLocals:
    """The variables of all running calls, of a great many calls only those of some.

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
    return RunningLocals(found, are_all=remaining > 0)


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
            variables = [*read(frame).items(), *(("", each) for each in unnamed_values_of(frame))]
            if values is not None:
                values[is_library].extend(value for _, value in variables)
            for name, value in variables:
                known = found.get(id(value))
                if known is None or (known.is_library and not is_library):
                    found[id(value)] = Local(is_library, name, function, runner, thread)
        frame = frame.f_back
        count += 1
    return count


@lru_cache(4096)
def _kind_of(filename: str) -> FrameKind:
    return kind_of(filename)


class CallUse(NamedTuple):
    """What a running call has to do with a connection. Plain data: it keeps nothing alive.

    Attributes:
        sentence: Where the call is now.
        hint: What to change.
    """

    sentence: str
    hint: str


class RunningCalls:
    """Finds the connections that calls in other threads have not done with.

    A connection that was accepted is in use as long as a call runs that was given it; a response
    whose connection is closed, as long as a call has it in a variable; and what an event loop
    waits for, as long as a single call keeps the loop from looking. A call that makes the report
    is none of these.

    Args:
        registry: Has the sockets.

    Attributes:
        notes: What could not be looked at the last time.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.notes: tuple[str, ...] = ()

    def uses(
        self,
        findings: tuple[Finding, ...],
        settings: Settings,
        fd_limit: int | None,
        limit: TimeLimit,
    ) -> dict[int, CallUse]:
        """By serial, the connections that are in use.

        Args:
            findings: What was found. Beyond a threshold a call excuses nothing.
            settings: The thresholds.
            fd_limit: How many descriptors the process may have.
            limit: Of the time; calls that are not searched use nothing.
        """
        self.notes = ()
        try:
            return self._uses(excusable_by_calls(findings, settings, fd_limit), limit)
        except Exception:
            self.notes = ("what running calls do with connections: looking at them has failed",)
            return {}

    def _uses(self, ended: tuple[Finding, ...], limit: TimeLimit) -> dict[int, CallUse]:
        by_fd = {each.observation.fd: each.observation for each in ended}
        by_object: dict[int, Finding] = {}
        for each in ended:
            sock = self._registry.socket_of(each.observation.fd, each.observation.record.serial)
            if sock is not None:
                by_object[id(sock)] = each
        search = _VariableSearch(by_object)
        uses: dict[int, CallUse] = {}
        calls = _calls_of_others() if by_object else iter(())
        for number, (thread, innermost, frame, callee) in enumerate(calls, 1):
            for observation in search.used_by(frame):
                use = _use_of_handler(thread, innermost, observation)
                uses.setdefault(observation.record.serial, use)
            for observation in _awaited_by_loop(frame, callee, by_fd):
                uses[observation.record.serial] = _use_of_loop(thread, innermost, observation)
            if number == _MAX_FRAMES or limit.is_over():
                if next(calls, None) is not None:
                    why = _TOO_MANY if number == _MAX_FRAMES else "for lack of time"
                    note = f"what running calls do with connections: not all of them, {why}"
                    self.notes = (note,)
                break
        return uses


def _calls_of_others() -> Iterator[tuple[int, FrameType, FrameType, FrameType | None]]:
    """The calls of other threads: the thread, its innermost call, a call, and what that calls."""
    for thread, innermost in running_frames().items():
        callee: FrameType | None = None
        frame = None if thread == get_ident() else innermost
        while frame is not None:
            yield thread, innermost, frame, callee
            callee, frame = frame, frame.f_back


class _VariableSearch:
    """Searches the variables of calls for sockets, and for what wraps them.

    Args:
        by_object: What to find, by the identity of the socket.
    """

    def __init__(self, by_object: Mapping[int, Finding]) -> None:
        self._by_object = by_object
        self._has_lingering = any(each.verdict is Verdict.LINGERING for each in by_object.values())
        # By identity: the same few objects are variables of most calls of a thread. One that is
        # gone and whose identity another has got is not found in this scan.
        self._without: set[int] = set()

    def used_by(self, frame: FrameType) -> Iterator[Observation]:
        """What the call has been given, and the closed responses in its variables."""
        code = frame.f_code
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if not (arguments or self._has_lingering) or is_ours(text_of(code.co_filename) or ""):
            return
        for name, value in locals_of_other_thread(frame).items():
            if not (self._has_lingering or name in arguments):
                continue
            finding = self._finding_within(value)
            if finding is None:
                continue
            record, is_lingering = finding.observation.record, finding.verdict is Verdict.LINGERING
            if is_lingering or (record.origin is Origin.ACCEPTED and name in arguments):
                yield finding.observation

    def _finding_within(self, value: Any) -> Finding | None:
        """The finding of a socket, or of the one that a connection or response wraps."""
        waiting, searched = [value], set[int]()
        while waiting and len(searched) < _MAX_WRAPPERS:
            inner = waiting.pop()
            finding = self._by_object.get(id(inner))
            if finding is not None:
                return finding
            if id(inner) not in self._without and id(type(inner)) not in _PLAIN:
                searched.add(id(inner))
                waiting += _wrapped_by(inner)
        self._without |= searched
        return None


def _wrapped_by(thing: Any) -> list[Any]:
    variables = attribute_dict(thing)
    if variables is None:
        found = [field(thing, name) for name in _WRAPPED]
    else:
        found = [value_at(variables, name) for name in _WRAPPED]
    found.append(native_field(thing, io.BufferedReader, "raw"))
    return [each for each in found if each is not None]


def _is_call(frame: FrameType | None, function: str, module: str) -> bool:
    return (
        frame is not None
        and frame.f_code.co_name == function
        and text_of(frame.f_globals.get("__name__")) == module
    )


def _awaited_by_loop(
    frame: FrameType, callee: FrameType | None, by_fd: Mapping[int, Observation]
) -> Iterator[Observation]:
    """What the loop would have been woken for, if the call that it has made had ended."""
    if not _is_call(frame, "_run_once", "asyncio.base_events"):
        return
    if not _is_call(callee, "_run", "asyncio.events"):
        return
    selector = field(locals_of_other_thread(frame).get("self"), LOOP_SELECTOR)
    for fd, registered in items_of(field(selector, SELECTOR_KEYS)):
        # A file object, its descriptor, the events to wait for, and what to call.
        key = elements_of(registered)
        if fd in by_fd and len(key) > 2 and (number_of(key[2]) or 0) & _EVENT_READ:
            yield by_fd[fd]


def _use_of_handler(thread: int, frame: FrameType, observation: Observation) -> CallUse:
    place = _describe_place(frame)
    ago = format_duration(observation.ended_for, at_least=observation.is_lower_bound)
    return CallUse(
        f"thread {thread_name(thread)}, still in {place}",
        f"the client disconnected {ago} ago; still in {place}: normal unless it persists",
    )


def _use_of_loop(thread: int, frame: FrameType, observation: Observation) -> CallUse:
    place, duration = _describe_place(frame), format_duration(observation.ended_for)
    return CallUse(
        f"the event loop of thread {thread_name(thread)}: the loop is blocked at {place}",
        "do not block the event loop: use `await asyncio.to_thread(...)` or an asynchronous call "
        f"(the loop has not run for {duration})",
    )


def _describe_place(frame: FrameType) -> str:
    return describe_calls(calls_of(frame)).replace(" in ", " ", 1)
