"""Which thread and which asyncio task the program is in, asked without side effects.

What is done at each birth: the hottest path of all.

It is a function that has all it needs among its own variables. To look a thing up elsewhere takes
the longer the more the program has done since the last birth.
"""

from __future__ import annotations

import _socket
import os
import socket
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from closewait_guard._capture.context import PlainContext, current_labels
from closewait_guard._capture.creation import NO_CONTEXT, STACK, CreationTuple
from closewait_guard._capture.hooks import FRAMES_TO_CALLER
from closewait_guard._capture.origin import origin_of
from closewait_guard._capture.stack import NO_STACK, Capture, intern
from closewait_guard._clock import wall
from closewait_guard._enums import Origin
from closewait_guard._interruptions import interrupts
from closewait_guard._live import exact_text

__all__ = [
    "CreationTable",
    "recorder",
    "task_name",
    "threads",
]


# Not threading.current_thread(), which registers a dummy for every foreign thread that asks.
threads: dict[int, Any] = threading._active  # type: ignore[attr-defined]


def task_name() -> str | None:
    """The name of the task that runs in this thread's event loop; None outside of one."""
    try:
        task = sys.modules["asyncio"].current_task()
        return exact_text(task.get_name()) if task is not None else None
    except Exception as error:
        if interrupts(error):
            raise
        # A task class of somebody's has no names.
        return None


_SETTLE_AFTER = 256


class CreationTable:
    """The births by descriptor, and who has given his descriptor away.

    Attributes:
        pid: The process in which births happen.
        has_news: True if there has been a birth since the latest sweep, which puts a mark here.
        youngest: The serial of the latest birth.
    """

    __slots__ = ("births", "detached", "has_news", "pid", "settle_at", "youngest")

    def __init__(self) -> None:
        self.births: dict[int, CreationTuple] = {}
        self.detached: dict[int, tuple[CreationTuple, int]] = {}
        self.pid = os.getpid()
        self.has_news: object = True
        self.youngest = 0
        self.settle_at = _SETTLE_AFTER

    def settle(self, serial: int) -> None:
        """Make the stacks of the sockets that live on small.

        As many births lie between two times as there are sockets: each pays next to nothing.
        """
        births = self.births.copy()
        self.settle_at = serial + max(_SETTLE_AFTER, len(births))
        for birth in births.values():
            intern(birth[STACK])


def recorder(
    book: CreationTable,
    count: Callable[[], int],
    context: PlainContext | None,
    capture: Capture,
    depth: int,
) -> Callable[[socket.socket, object], None]:
    """What to call at each birth, to have it written into a book."""
    births, detached, created, caller = book.births, book.detached, Origin.CREATED, FRAMES_TO_CALLER
    fileno, reference, now = _socket.socket.fileno, weakref.ref, wall
    frame, thread_id, thread_of = sys._getframe, threading.get_ident, threads.get
    module, labels = sys.modules.get, current_labels
    ask, ask_next = (None, dict) if context is None else (context.ask, context.ask_next)

    def on_create(sock: socket.socket, descriptor: object) -> None:
        fd = fileno(sock)
        if descriptor is None:
            origin, parent = created, None
        else:
            origin, parent = origin_of(fd, frame(caller), births, detached)
        thread = thread_of(thread_id())
        asyncio = module("_asyncio")
        serial = count()
        name = thread._name if thread is not None else f"thread-{thread_id()}"
        # In the order of Birth, but plain: a named tuple takes three times as long to make.
        births[fd] = (
            reference(sock),
            id(sock),
            serial,
            book.pid,
            now(),
            name if type(name) is str else exact_text(name),
            # A call into C; most births are in no event loop.
            None if asyncio is None or asyncio._get_running_loop() is None else task_name(),
            labels(),
            NO_CONTEXT if ask is None else ask() or ask_next(),
            origin,
            parent,
            capture(frame(caller), depth) if depth else NO_STACK,
        )
        book.has_news = True
        book.youngest = serial
        if serial >= book.settle_at:
            book.settle(serial)

    return on_create
