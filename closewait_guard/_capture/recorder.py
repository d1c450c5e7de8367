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

from closewait_guard._capture.context import PlainContext, current_labels
from closewait_guard._capture.creation import NO_CONTEXT, STACK, CreationTuple, origin_of
from closewait_guard._capture.hooks import FRAMES_TO_CALLER
from closewait_guard._capture.stack import NO_STACK, Capture, intern
from closewait_guard._clock import wall
from closewait_guard._cpython import current_frame, threads, weak_reference
from closewait_guard._enums import Origin
from closewait_guard._interruptions import interrupts
from closewait_guard._live import exact_text

__all__ = [
    "CreationTable",
    "make_recorder",
    "task_name",
]


def task_name() -> str | None:
    """The name of the task that runs in this thread's event loop; None outside of one."""
    try:
        task = sys.modules["asyncio"].current_task()
        return exact_text(task.get_name()) if task is not None else None
    except Exception as error:
        if interrupts(error):
            raise
        # Not every class of tasks gives them names.
        return None


_INTERN_AFTER = 256


class CreationTable:
    """The creations by descriptor, and those whose sockets were detached from it.

    Attributes:
        pid: The process in which sockets are created.
        changed: True if a socket was created since the latest sweep, which puts a mark here.
        last_serial: The serial of the latest creation.
    """

    __slots__ = ("changed", "creations", "detached", "intern_at", "last_serial", "pid")

    def __init__(self) -> None:
        self.creations: dict[int, CreationTuple] = {}
        self.detached: dict[int, tuple[CreationTuple, int]] = {}
        self.pid = os.getpid()
        self.changed: object = True
        self.last_serial = 0
        self.intern_at = _INTERN_AFTER

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
    creations, detached, created, caller = (
        table.creations,
        table.detached,
        Origin.CREATED,
        FRAMES_TO_CALLER,
    )
    fileno, reference, now = _socket.socket.fileno, weak_reference, wall
    frame, thread_id, thread_of = current_frame, threading.get_ident, threads.get
    module, labels = sys.modules.get, current_labels
    provider, fallback_provider = (
        (None, dict) if context is None else (context.provider, context.fallback_provider)
    )

    def on_create(sock: socket.socket, descriptor: object) -> None:
        fd = fileno(sock)
        if descriptor is None:
            origin, parent = created, None
        else:
            origin, parent = origin_of(fd, frame(caller), creations, detached)
        thread = thread_of(thread_id())
        asyncio = module("_asyncio")
        serial = count()
        name = thread._name if thread is not None else f"thread-{thread_id()}"
        # In the order of Creation, but plain: a named tuple takes three times as long to make.
        creations[fd] = (
            reference(sock),
            id(sock),
            serial,
            table.pid,
            now(),
            name if type(name) is str else exact_text(name),
            # A call into C; most creations are in no event loop.
            None if asyncio is None or asyncio._get_running_loop() is None else task_name(),
            labels(),
            NO_CONTEXT if provider is None else provider() or fallback_provider(),
            origin,
            parent,
            capture(frame(caller), depth) if depth else NO_STACK,
        )
        table.changed = True
        table.last_serial = serial
        if serial >= table.intern_at:
            table.intern_stacks(serial)

    return on_create
