"""What is recorded of each socket when it is created: the hottest path of all.

In C where the extension is there, else in Python. There `on_create` is a function that has all it
needs among its own variables: to look a thing up elsewhere takes the longer the more the program
has done since the last creation.
"""

from __future__ import annotations

import _socket
import itertools
import os
import socket
import sys
import threading
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from closewait_guard._capture.context import LABELS, PlainContext
from closewait_guard._capture.creation import (
    NO_CONTEXT,
    STACK,
    Creation,
    CreationTuple,
    as_parent,
    origin_of,
)
from closewait_guard._capture.hooks import (
    FRAMES_TO_CALLER,
    SOCKET,
    code_of,
    listener_in_accept_by_thread,
)
from closewait_guard._capture.speedups import find_speedups
from closewait_guard._capture.stack import (
    PROGRAM,
    Capture,
    CapturedStack,
    capture,
    capture_up_to,
    intern,
    owner_of,
    uncaptured,
)
from closewait_guard._clock import wall
from closewait_guard._cpython import (
    REFERENCE_CALLBACK,
    current_frame,
    running_loop,
    threads,
    weak_reference,
)
from closewait_guard._enums import Origin
from closewait_guard._interruptions import interrupts
from closewait_guard._live import exact_text

if TYPE_CHECKING:
    from closewait_guard._capture._speedups import Recorder
    from closewait_guard._enums import Scalar

__all__ = [
    "CreationRecorder",
    "PythonRecorder",
    "Recording",
    "make_recorder",
    "note_task",
]


# The flags of code as in `inspect`, which takes long to import: CO_COROUTINE and
# CO_ITERABLE_COROUTINE.
_COROUTINE = 0x80 | 0x100
# What can await one, besides another: CO_ASYNC_GENERATOR, CO_GENERATOR.
_AWAITING = _COROUTINE | 0x200 | 0x20


def note_task(stack: CapturedStack, caller: FrameType, capture: Capture, depth: int) -> str | None:
    """The name of the task that runs in this thread's event loop; None outside of one.

    A stack without a line of the program goes on in the tasks that await this one.

    Args:
        stack: What was captured.
        caller: From where on it was captured.
        capture: Captures calls.
        depth: How many calls to take of each task.
    """
    try:
        in_asyncio = running_loop() is not None
        if not in_asyncio and not sys.modules["trio"].lowlevel.in_trio_task():
            return None
    except Exception as error:
        if interrupts(error):
            raise
        return None
    _continue_in_tasks(stack, caller, capture, depth)
    return _name_of_current_task(in_asyncio=in_asyncio)


def _name_of_current_task(*, in_asyncio: bool) -> str | None:
    try:
        if in_asyncio:
            task = sys.modules["asyncio"].current_task()
            return exact_text(task.get_name()) if task is not None else None
        return exact_text(sys.modules["trio"].lowlevel.current_task().name)
    except Exception as error:
        if interrupts(error):
            raise
        # Not every class of tasks gives them names.
        return None


def _continue_in_tasks(
    stack: CapturedStack, caller: FrameType, capture: Capture, depth: int
) -> None:
    try:
        for calls, code in enumerate(stack[::2]):
            if (owner := owner_of(code.co_filename)) is None:
                continue
            is_runner = code.co_name in owner
            if owner is PROGRAM:
                # A function runs a coroutine by means of an event loop in C, which shows no call.
                is_runner = calls > 0 and bool(
                    stack[calls * 2 - 2].co_flags & _COROUTINE and not code.co_flags & _AWAITING
                )
                if not is_runner:
                    break
            if is_runner:
                _find_continue_stack()(stack, calls, caller, capture, depth)
                break
    except Exception as error:
        if interrupts(error):
            raise
        # The stack ends where it could not be continued.


@cache
def _find_continue_stack() -> Callable[[CapturedStack, int, FrameType, Capture, int], None]:
    # Not before it is needed: most programs have no such task. Each import statement takes as long
    # as all the rest.
    from closewait_guard._capture.awaiting import continue_stack

    return continue_stack


class Recording(NamedTuple):
    """How to record creations.

    Attributes:
        stack_depth: How many calls to remember of each.
        ends: Stacks end before calls of these, further out than the innermost.
        speedups: Whether to record in C, where that can be.
    """

    stack_depth: int
    ends: tuple[CodeType, ...] = ()
    speedups: bool = True


_INTERN_AFTER = 256

OnCreate = Callable[[socket.socket, object], None]


class CreationRecorder(Protocol):
    """Writes a record of each socket that is created into a table.

    Attributes:
        pid: The process in which sockets are created.
        last_serial: The serial of the latest creation.
    """

    pid: int

    @property
    def last_serial(self) -> int: ...

    @property
    def on_create(self) -> OnCreate:
        """Record a socket that was created; the second argument is what it was made of, or None."""

    @property
    def count(self) -> Callable[[], int]:
        """The number of an event: one more than that of the last, a creation or another."""


def make_recorder(
    creations: dict[int, CreationTuple],
    detached: dict[int, tuple[CreationTuple, int]],
    context: PlainContext | None,
    recording: Recording,
    identify: Callable[[Any], int] = _socket.socket.fileno,
) -> CreationRecorder:
    """What records each creation by its descriptor.

    Args:
        creations: Where to write them.
        detached: Those whose sockets were detached from the descriptor.
        context: Calls the program's context provider, if it has one.
        recording: How to record.
        identify: The number by which to record what was made: its descriptor, if it is a socket.
    """
    speedups = find_speedups() if recording.speedups else None
    if speedups is None:
        return PythonRecorder(creations, detached, context, recording, identify)
    return _make_c_recorder(speedups.recorder, creations, detached, context, recording, identify)


def _make_c_recorder(
    recorder: type[Recorder],
    creations: dict[int, CreationTuple],
    detached: dict[int, tuple[CreationTuple, int]],
    context: PlainContext | None,
    recording: Recording,
    identify: Callable[[Any], int],
) -> Recorder:
    depth, capture = recording.stack_depth, _capture_for(recording)

    def note(stack: CapturedStack, caller: FrameType) -> str | None:
        return note_task(stack, caller, capture, depth)

    provider, fallback_provider = _providers(context)
    return recorder(
        fields=Creation._fields,
        depth=depth,
        pid=os.getpid(),
        intern_after=_INTERN_AFTER,
        creations=creations,
        detached=detached,
        listeners=listener_in_accept_by_thread,
        threads=threads,
        modules=sys.modules,
        ends=recording.ends,
        fileno=identify,
        reference_callback=REFERENCE_CALLBACK,
        labels=LABELS,
        provider=provider,
        fallback_provider=fallback_provider,
        no_context=NO_CONTEXT,
        created=Origin.CREATED,
        accepted=Origin.ACCEPTED,
        accept_code=code_of(SOCKET.accept),
        as_parent=as_parent,
        origin_of=origin_of,
        note_task=note,
        exact_text=exact_text,
        intern_stacks=_intern_stacks,
    )


def _capture_for(recording: Recording) -> Capture:
    if not recording.stack_depth:
        return uncaptured
    return capture_up_to(recording.ends) if recording.ends else capture


def _providers(
    context: PlainContext | None,
) -> tuple[Callable[[], dict[str, Scalar] | None] | None, Callable[[], dict[str, Scalar]]]:
    return (None, dict) if context is None else (context.provider, context.fallback_provider)


def _intern_stacks(creations: dict[int, CreationTuple]) -> None:
    """Make the stacks of the sockets that live on small."""
    for creation in creations.copy().values():
        intern(creation[STACK])


class PythonRecorder:
    """The twin of `Recorder` in `_speedups.c`: both write the same."""

    __slots__ = ("_intern_at", "count", "last_serial", "on_create", "pid")

    def __init__(
        self,
        creations: dict[int, CreationTuple],
        detached: dict[int, tuple[CreationTuple, int]],
        context: PlainContext | None,
        recording: Recording,
        identify: Callable[[Any], int] = _socket.socket.fileno,
    ) -> None:
        self.pid = os.getpid()
        self.last_serial = 0
        self.count = itertools.count(1).__next__
        self.on_create = _on_create(self, creations, detached, context, recording, identify)
        self._intern_at = _INTERN_AFTER

    def intern_if_due(self, creations: dict[int, CreationTuple], serial: int) -> None:
        """Make the stacks of the sockets that live on small, where it is time."""
        if serial >= self._intern_at:
            # As many creations lie between as there are sockets: each pays next to nothing.
            self._intern_at = serial + max(_INTERN_AFTER, len(creations))
            _intern_stacks(creations)


def _on_create(
    recorder: PythonRecorder,
    creations: dict[int, CreationTuple],
    detached: dict[int, tuple[CreationTuple, int]],
    context: PlainContext | None,
    recording: Recording,
    fileno: Callable[[Any], int],
) -> OnCreate:
    caller, count, created = FRAMES_TO_CALLER, recorder.count, Origin.CREATED
    reference, now = weak_reference, wall
    frame, thread_id, by_number = current_frame, threading.get_ident, threads
    modules, module, labels = sys.modules, sys.modules.get, LABELS.get
    provider, fallback_provider = _providers(context)
    depth, capture = recording.stack_depth, _capture_for(recording)

    def on_create(sock: socket.socket, descriptor: object) -> None:
        fd = fileno(sock)
        if descriptor is None:
            origin, parent = created, None
        else:
            origin, parent = origin_of(fd, frame(caller), creations, detached)
        try:
            name = by_number[thread_id()]._name
        except KeyError as error:
            if interrupts(error):
                raise
            name = f"thread-{thread_id()}"
        asyncio = module("_asyncio")
        serial = count()
        stack = capture(frame(caller), depth)
        # In the order of Creation, but plain: a named tuple takes three times as long to make.
        creations[fd] = (
            reference(sock),
            id(sock),
            serial,
            recorder.pid,
            now(),
            name if type(name) is str else exact_text(name),
            # Calls into C; most creations are in no event loop.
            None
            if (asyncio is None or asyncio._get_running_loop() is None) and "trio" not in modules
            else note_task(stack, frame(caller), capture, depth),
            labels(),
            NO_CONTEXT if provider is None else provider() or fallback_provider(),
            origin,
            parent,
            stack,
        )
        recorder.last_serial = serial
        recorder.intern_if_due(creations, serial)

    return on_create
