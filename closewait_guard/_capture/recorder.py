"""What is recorded of each socket when it is created: the hottest path of all.

`on_create` is a function that has all it needs among its own variables. To look a thing up
elsewhere takes the longer the more the program has done since the last creation.
"""

from __future__ import annotations

import _socket
import os
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

from closewait_guard._capture.context import PlainContext, current_labels
from closewait_guard._capture.creation import NO_CONTEXT, STACK, CreationTuple, origin_of
from closewait_guard._capture.hooks import FRAMES_TO_CALLER
from closewait_guard._capture.stack import (
    PROGRAM,
    Capture,
    CapturedStack,
    intern,
    owner_of,
    uncaptured,
)
from closewait_guard._clock import wall
from closewait_guard._cpython import current_frame, running_loop, threads, weak_reference
from closewait_guard._enums import Origin
from closewait_guard._interruptions import interrupts
from closewait_guard._live import exact_text

__all__ = [
    "CreationTable",
    "make_recorder",
    "note_task",
]


def task_name() -> str | None:
    """The name of the task that runs in this thread's event loop; None outside of one."""
    try:
        if running_loop() is not None:
            task = sys.modules["asyncio"].current_task()
            return exact_text(task.get_name()) if task is not None else None
        lowlevel = sys.modules["trio"].lowlevel
        return exact_text(lowlevel.current_task().name) if lowlevel.in_trio_task() else None
    except Exception as error:
        if interrupts(error):
            raise
        # Not every class of tasks gives them names.
        return None


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
        for calls, code in enumerate(stack[::2]):
            owner = owner_of(code.co_filename)
            if owner is PROGRAM:
                break
            if owner is not None and code.co_name in owner:
                # Not before it is needed: most programs have no such task.
                from closewait_guard._capture.awaiting import continue_stack

                continue_stack(stack, calls, caller, capture, depth)
                break
    except Exception as error:
        if interrupts(error):
            raise
        # The stack ends where it could not be continued.
    return task_name()


_CREATED = Origin.CREATED
_INTERN_AFTER = 256


class CreationTable:
    """The creations by descriptor, and those whose sockets were detached from it.

    Attributes:
        pid: The process in which sockets are created.
        changed: Another object after each change but a creation.
        last_serial: The serial of the latest creation.
    """

    __slots__ = ("changed", "creations", "detached", "intern_at", "last_serial", "pid")

    def __init__(self) -> None:
        self.creations: dict[int, CreationTuple] = {}
        self.detached: dict[int, tuple[CreationTuple, int]] = {}
        self.pid = os.getpid()
        self.changed = object()
        self.last_serial = 0
        self.intern_at = _INTERN_AFTER

    def state(self) -> tuple[int, object]:
        """Another one after each change."""
        return self.last_serial, self.changed

    def intern_stacks(self, serial: int) -> None:
        """Make the stacks of the sockets that live on small.

        As many creations lie between two times as there are sockets: each pays next to nothing.
        """
        creations = self.creations.copy()
        self.intern_at = serial + max(_INTERN_AFTER, len(creations))
        for creation in creations.values():
            intern(creation[STACK])


def make_recorder(
    table: CreationTable,
    count: Callable[[], int],
    context: PlainContext | None,
    capture: Capture,
    depth: int,
) -> Callable[[socket.socket, object], None]:
    """A function to call at each creation, which writes it into a table."""
    creations, detached, caller = table.creations, table.detached, FRAMES_TO_CALLER
    fileno, reference, now = _socket.socket.fileno, weak_reference, wall
    frame, thread_id, by_number = current_frame, threading.get_ident, threads
    modules, module, labels = sys.modules, sys.modules.get, current_labels
    provider, fallback_provider = (
        (None, dict) if context is None else (context.provider, context.fallback_provider)
    )
    if not depth:
        capture = uncaptured

    def on_create(sock: socket.socket, descriptor: object) -> None:
        fd = fileno(sock)
        if descriptor is None:
            origin, parent = _CREATED, None
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
            table.pid,
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
        table.last_serial = serial
        if serial >= table.intern_at:
            table.intern_stacks(serial)

    return on_create
