"""The weak table: who was born, who is alive, who was dropped while open.

Births are kept by descriptor number, each with a weak reference to its socket: the kernel hands a
number out again only when its last owner is closed, so a birth always replaces a finished story.
Nothing here takes a lock: births and deaths happen inside finalizers and signal handlers too.
"""

from __future__ import annotations

import _socket
import gc
import itertools
import os
import socket
import sys
import threading
import time
import weakref
from collections import deque
from typing import Any, NamedTuple

from closewait_guard._birth import (
    KEY,
    ORIGIN,
    PARENT,
    SERIAL,
    SOCK,
    STACK,
    Birth,
    Story,
    holds,
    inode_of,
    record_of,
)
from closewait_guard._context import PlainContext
from closewait_guard._labels import current_labels
from closewait_guard._lineage import lineage
from closewait_guard._patch import CALLER, SOCKET
from closewait_guard._probe import Probe, View
from closewait_guard._stack import NO_STACK, capture, settle
from closewait_guard._tally import Tally
from closewait_guard.model import Origin, Scalar, SocketRecord

__all__ = ["Drop", "Living", "Registry"]

_SETTLE_AFTER = 256

_CREATED = Origin.CREATED
_NO_CONTEXT: dict[str, Scalar] = {}

_fileno = _socket.socket.fileno
_close_called = SOCKET.__dict__["_closed"].__get__
_file_objects = SOCKET.__dict__["_io_refs"].__get__


class Drop(NamedTuple):
    """A socket that was finalized while it was open, and the kernel's last word on it."""

    birth: Birth
    fd: int
    collected: bool
    view: View | None


class Living(NamedTuple):
    """One moment's open sockets, by descriptor."""

    stories: dict[int, Story]
    close_called: set[int]
    detached: dict[int, Birth]

    def birth(self, fd: int) -> Birth | None:
        """The birth of one of them."""
        story = self.stories.get(fd)
        return self.detached.get(fd) if story is None else Birth._make(story)

    def born_after(self, mark: int) -> set[int]:
        """Those that are younger than a mark."""
        return {fd for fd, story in self.stories.items() if story[SERIAL] > mark}


class Registry:
    """Listens to the patch, and answers what it has heard."""

    def __init__(
        self, probe: Probe, stack_depth: int, context: PlainContext | None, dropped_kept: int
    ) -> None:
        self._probe = probe
        self._depth = stack_depth
        self._context = context
        self._pid = os.getpid()
        self._born, self._drops, self._failed = Tally(), Tally(), Tally()
        self._births: dict[int, Story] = {}
        self._detached: dict[int, tuple[Story, int]] = {}
        self._dropped: deque[Drop] = deque(maxlen=dropped_kept)
        self._has_adopted = False
        self._settle_at = _SETTLE_AFTER
        self._next_stranger = itertools.count(-1, -1).__next__
        self._next_serial = self._born.count

    # What the patch tells.

    def born(self, sock: socket.socket, descriptor: object) -> None:
        fd = _fileno(sock)
        if descriptor is None:
            origin, parent = _CREATED, None
        else:
            origin, parent = lineage(fd, sys._getframe(CALLER), self._births, self._detached)
        thread = _threads.get(threading.get_ident())
        asyncio = _modules.get("asyncio")
        serial = self._next_serial()
        # In the order of Birth, but plain: a named tuple takes three times as long to make.
        self._births[fd] = (
            _ref(sock),
            id(sock),
            serial,
            self._pid,
            _now(),
            thread._name if thread is not None else f"thread-{threading.get_ident()}",
            _task_name(asyncio) if asyncio is not None else None,
            current_labels(),
            self._context() if self._context is not None else _NO_CONTEXT,
            origin,
            parent,
            capture(sys._getframe(CALLER), self._depth) if self._depth else NO_STACK,
        )
        if serial >= self._settle_at:
            self._settle(serial)

    def _settle(self, serial: int) -> None:
        """Make the stacks of the sockets that live on small.

        As many births lie between two times as there are sockets: each pays next to nothing.
        """
        births = self._births.copy()
        self._settle_at = serial + max(_SETTLE_AFTER, len(births))
        for birth in births.values():
            settle(birth[STACK])

    def detached(self, sock: socket.socket, fd: int) -> None:
        story = self._births.get(fd)
        if story is None or story[KEY] != id(sock):
            return
        parent = story[PARENT]
        if story[ORIGIN] is Origin.WRAPPED and parent is not None and holds(parent, fd):
            self._births[fd] = parent
        else:
            self._detached[fd] = (story, os.fstat(fd).st_ino)

    def dying(self, sock: socket.socket, fd: int) -> None:
        story = self._births.get(fd)
        if story is None or story[KEY] != id(sock):
            story = self._stranger(sock)
        else:
            # Nobody else can have been given this number: its owner is still open.
            self._births.pop(fd, None)
        # The collector clears weak references before it finalizes; a last reference that goes
        # finalizes first.
        collected = story[SOCK]() is None
        view = self._probe.look(sock, fd, 0)
        self._dropped.append(Drop(Birth._make(story), fd, collected, view))
        self._drops.count()

    def failed(self) -> None:
        self._failed.count()

    # What a scan asks.

    def living(self) -> Living:
        """The sockets that are open at this moment; forgets those that are not."""
        stories = self._births.copy()
        close_called: set[int] = set()
        for fd, story in list(stories.items()):
            sock = story[SOCK]()
            if sock is None or _fileno(sock) != fd:
                del stories[fd]
                if fd not in self._detached:
                    _discard(self._births, fd, story)
                continue
            # Without a file object it is a close() under way, a few bytecodes from its end.
            if _close_called(sock) and _file_objects(sock) > 0:
                close_called.add(fd)
        sock = None
        return Living(stories, close_called, self._still_detached())

    def _still_detached(self) -> dict[int, Birth]:
        """Descriptors that left their socket object and are still open, told by their inode."""
        still: dict[int, Birth] = {}
        for fd, entry in self._detached.copy().items():
            story, inode = entry
            if self._births.get(fd) is story and inode_of(fd) == inode:
                still[fd] = Birth._make(story)
            else:
                _discard(self._detached, fd, entry)
        return still

    def dropped(self) -> tuple[Drop, ...]:
        """The youngest of the sockets that were finalized while open."""
        return tuple(self._dropped.copy())

    def mark(self) -> int:
        """A number above the serial of every socket born so far, and below the next."""
        return self._born.mark()

    def totals(self) -> tuple[int, int, int]:
        """How many were born under our eyes, how many dropped, and what went unrecorded."""
        return self._born.total(), self._drops.total(), self._failed.total()

    def record_of(self, birth: Birth) -> SocketRecord:
        """The public record of a birth."""
        return record_of(birth, self._pid)

    def adopted_now(self) -> int:
        """How many of the open sockets are older than the guard."""
        if not self._has_adopted:
            return 0
        return sum(story[SERIAL] < 0 for story in self._births.copy().values())

    # Who was there before, and who came over a fork.

    def adopt(self) -> None:
        """Take in every open socket object that is not known yet, its birth unknown."""
        for thing in gc.get_objects():
            # The type, not isinstance: that would wake proxies, which pose as what they stand for.
            if SOCKET in type(thing).__mro__:
                self._adopt(thing)
                self._has_adopted = True

    def _adopt(self, sock: socket.socket) -> None:
        try:
            fd = _fileno(sock)
        except Exception:
            # Not initialized: made by __new__ alone.
            return
        known = self._births.get(fd)
        if fd >= 0 and not (known is not None and holds(known, fd)):
            if known is not None:
                _discard(self._births, fd, known)
            self._births.setdefault(fd, self._stranger(sock))

    def _stranger(self, sock: socket.socket) -> Story:
        birth = Birth(
            sock=_ref(sock),
            key=id(sock),
            # Below zero: older than every mark, and never the serial of a birth.
            serial=self._next_stranger(),
            pid=self._pid,
            born_at=None,
            thread="",
            task=None,
            labels=(),
            context=_NO_CONTEXT,
            origin=Origin.ADOPTED,
            parent=None,
            stack=NO_STACK,
        )
        return tuple(birth)

    def after_fork(self) -> None:
        """In the child: from now on, births are our own, and those before are inherited."""
        self._pid = os.getpid()
        for tally in (self._born, self._drops, self._failed):
            tally.after_fork()


def _discard(table: dict[int, Any], key: int, value: object) -> None:
    """Remove an entry unless it has been replaced: another thread may register this moment."""
    found = table.pop(key, None)
    if found is not None and found is not value:
        table.setdefault(key, found)


def _task_name(asyncio: Any) -> str | None:
    try:
        if asyncio._get_running_loop() is None:
            return None
        task = asyncio.current_task()
        return task.get_name() if task is not None else None
    except Exception:
        # asyncio is being imported at this moment, or a task class of somebody's has no names.
        return None


# Not threading.current_thread(), which registers a dummy for every foreign thread that asks.
_threads: dict[int, Any] = threading._active  # type: ignore[attr-defined]

_modules = sys.modules
_now = time.time
_ref = weakref.ref
