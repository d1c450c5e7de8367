"""The sockets that are open when a guard is installed: nobody has seen them opened.

What the registry answers a scan with: those that are open at one moment.

The weak table: who was opened, who is alive, who was dropped while open.

Births are kept by descriptor number, each with a weak reference to its socket: the kernel hands a
number out again only when its last owner is closed, so a birth always replaces a finished story.
Nothing here takes a lock: births and deaths happen inside finalizers and signal handlers too.


The births whose sockets have not been closed: cheap, because nothing asks the kernel.
"""

from __future__ import annotations

import _socket
import itertools
import math
import os
import socket
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from closewait_guard._capture import patch
from closewait_guard._capture.context import PlainContext
from closewait_guard._capture.creation import (
    OBJECT_ID,
    ORIGIN,
    PARENT,
    SERIAL,
    SOCK,
    Creation,
    CreationTuple,
    pop_if_same,
    still_owns,
    unknown_creation,
)
from closewait_guard._capture.dropped import DroppedSocket, DroppedSockets, Endings, LockFreeCounter
from closewait_guard._capture.hooks import SOCKET
from closewait_guard._capture.recorder import CreationTable, recorder
from closewait_guard._capture.stack import Capture
from closewait_guard._descriptors import inode_of, socket_inode_of
from closewait_guard._enums import Origin
from closewait_guard._live import instances_of, kinds_of
from closewait_guard._threads import in_child

__all__ = [
    "OpenSockets",
    "Registry",
    "strangers",
    "unfinished",
]


_fileno = _socket.socket.fileno


def strangers(births: dict[int, CreationTuple]) -> Iterator[tuple[int, socket.socket]]:
    """The open sockets without a birth, by descriptor; what is known of one before goes."""
    for sock in instances_of(kinds_of(SOCKET)):
        fd = _number_of(sock)
        known = births.get(fd)
        if fd < 0 or (known is not None and still_owns(known, fd)):
            continue
        if known is not None:
            pop_if_same(births, fd, known)
        yield fd, sock


def _number_of(sock: socket.socket) -> int:
    try:
        return _fileno(sock)
    except Exception:
        # Not initialized: made by __new__ alone.
        return -1


class OpenSockets:
    """One moment's open sockets, by descriptor."""

    __slots__ = ("close_called", "detached", "stories")

    def __init__(
        self, stories: dict[int, CreationTuple], close_called: set[int], detached: set[int]
    ) -> None:
        self.stories = stories
        self.close_called = close_called
        self.detached = detached

    def opened_after(self, mark: int) -> set[int]:
        """Those that are younger than a mark."""
        return {fd for fd, story in self.stories.items() if story[SERIAL] > mark}


_fileno = _socket.socket.fileno
_is_closed = SOCKET.__dict__["_closed"].__get__
_file_objects = SOCKET.__dict__["_io_refs"].__get__


class _Sweep(NamedTuple):
    """The births that a sweep has left; its mark is in the book for as long as they are all."""

    mark: object
    stories: dict[int, CreationTuple]


class Registry:
    """Listens to the patch, and answers what it has heard.

    Attributes:
        context: What calls the program's context provider, if it has one.
        on_fd_exhausted: What to call when no descriptor was left.
    """

    def __init__(
        self,
        stack_depth: int,
        context: PlainContext | None,
        dropped_kept: int,
        capture: Capture,
    ) -> None:
        self.context = context
        self.on_fd_exhausted: Callable[[], None] = _nothing
        self._book = CreationTable()
        self._births, self._detached = self._book.births, self._book.detached
        self._born, self._failed = LockFreeCounter(), LockFreeCounter()
        self._drops = DroppedSockets(dropped_kept)
        self._last = _Sweep(object(), {})
        self._endings = Endings()
        self._has_adopted = False
        self._with_files: set[int] = set()
        self._next_stranger = itertools.count(-1, -1).__next__
        self.on_create = recorder(self._book, self._born.count, context, capture, stack_depth)
        # A number above the serial of every socket opened so far, and below the next.
        self.mark = self._born.mark

    def listen(self) -> None:
        """Record births from now on. Idempotent."""
        with patch.install_lock():
            _listening.add(self)
            patch.subscribe(self)

    def stop(self) -> None:
        """Record no more."""
        with patch.install_lock():
            _listening.discard(self)
            patch.unsubscribe(self)

    # What the patch tells.

    def on_makefile(self, sock: socket.socket) -> None:
        self._with_files.add(_fileno(sock))

    def on_detach(self, sock: socket.socket, fd: int) -> None:
        story = self._births.get(fd)
        if story is None or story[OBJECT_ID] != id(sock):
            return
        parent = story[PARENT]
        if story[ORIGIN] is Origin.WRAPPED and parent is not None and still_owns(parent, fd):
            self._births[fd] = parent
            self._book.has_news = True
        elif (inode := inode_of(fd)) is not None:
            self._detached[fd] = (story, inode)

    def on_finalize(self, sock: socket.socket, fd: int) -> None:
        story = self._births.get(fd)
        if story is None or story[OBJECT_ID] != id(sock):
            story = self._stranger(sock)
        else:
            # Nobody else can have been given this number: its owner is still open.
            self._births.pop(fd, None)
            self._book.has_news = True
        self._drops.add(story, sock, fd)

    def on_error(self) -> None:
        self._failed.count()

    # What a scan asks.

    def living(self, *, thorough: bool = False) -> OpenSockets:
        """The sockets that are open at this moment.

        With many sockets most of the time goes into touching each one's objects. That is done
        only if there has been a birth since it was done last; otherwise the closed ones stay in
        until a poll shows that their numbers are free, and `forget` is told.
        """
        last = self._last
        if self._book.has_news is not last.mark or thorough:
            last = self._last = self._sweep()
        return OpenSockets(last.stories, self._close_called(), self._still_detached())

    def _sweep(self) -> _Sweep:
        # Before the sweep: a birth meanwhile, or the sweep of another scan, makes this one old.
        mark = self._book.has_news = object()
        births = self._births.copy()
        closed = [
            fd
            for fd, story in births.items()
            if (sock := story[SOCK]()) is None or _is_closed(sock)
        ]
        sock = None
        for fd in closed:
            if fd not in self._detached and not self._keeps_descriptor(fd, births[fd]):
                story = births.pop(fd)
                if self._endings.is_over(fd, story):
                    pop_if_same(self._births, fd, story)
        self._endings.forget_all_but(self._births)
        return _Sweep(mark, births)

    def forget(self, fd: int, story: CreationTuple) -> None:
        """Let go of a birth whose descriptor is closed."""
        if fd not in self._detached:
            pop_if_same(self._births, fd, story)
        self._book.has_news = True

    def _close_called(self) -> set[int]:
        """Descriptors that outlived a `close()`, because a file object keeps them."""
        births, still = self._births, set()
        for fd in self._with_files.copy():
            story = births.get(fd)
            sock = None if story is None else story[SOCK]()
            if story is None or sock is None or _fileno(sock) != fd:
                self._with_files.discard(fd)
                if births.get(fd) is not story:
                    # Born meanwhile, and it may have a file by now.
                    self._with_files.add(fd)
            elif _is_closed(sock) and self._keeps_descriptor(fd, story):
                still.add(fd)
        return still

    def _keeps_descriptor(self, fd: int, story: CreationTuple) -> bool:
        """Whether a closed socket is open all the same, and not just a bytecode from its end."""
        sock = story[SOCK]()
        return sock is not None and _fileno(sock) == fd and _file_objects(sock) > 0

    def _still_detached(self) -> set[int]:
        """Descriptors that left their socket object and are still open, told by their inode."""
        still: set[int] = set()
        for fd, entry in self._detached.copy().items():
            story, inode = entry
            if self._births.get(fd) is story and inode_of(fd) == inode:
                still.add(fd)
            else:
                pop_if_same(self._detached, fd, entry)
        return still

    def has_closed_all(self, since: int) -> bool:
        """Whether no socket opened after a mark is open, or was dropped: no is a perhaps."""
        if self._detached or self._drops.kept:
            return False
        for fd, story in self._births.copy().items():
            if story[SERIAL] > since and _may_be_open(fd, story):
                return False
        return True

    def youngest(self) -> int:
        """The serial of the latest birth: a mark for `has_closed_all` that takes no lock.

        Where threads race it may be that of one before, and a mark too low accuses nobody.
        """
        return self._book.youngest

    def socket_of(self, fd: int, serial: int) -> socket.socket | None:
        """The socket of a record, if it is still there."""
        story = self._births.get(fd)
        return None if story is None or story[SERIAL] != serial else story[SOCK]()

    def knows(self, fd: int, since: float = math.inf) -> bool:
        """Whether a number is that of a socket object, has left one, or was one's after a mark."""
        story = self._births.get(fd)
        return story is not None and (
            story[SERIAL] > since or fd in self._detached or still_owns(story, fd)
        )

    def dropped(self) -> tuple[DroppedSocket, ...]:
        """The youngest of the sockets that were finalized while open."""
        return self._drops.youngest()

    def totals(self) -> tuple[int, int, int]:
        """How many were opened under our eyes, how many dropped, and what went unrecorded."""
        return self._born.total(), self._drops.tally.total(), self._failed.total()

    def is_open(self, fd: int, serial: int) -> bool:
        """Whether the socket of that birth is open yet."""
        story = self._births.get(fd)
        return story is not None and story[SERIAL] == serial and fd in self._last.stories

    @property
    def pid(self) -> int:
        """The process in which births are recorded."""
        return self._book.pid

    def lately_open(self) -> Iterable[CreationTuple]:
        """The sockets that the last look has found open."""
        return self._last.stories.values()

    def adopted_now(self) -> int:
        """How many of the open sockets are older than the guard."""
        if not self._has_adopted:
            return 0
        return sum(story[SERIAL] < 0 for story in self.lately_open())

    # Who was there before, and who came over a fork.

    def adopt(self) -> None:
        """Take in every open socket object that is not known yet, its birth unknown."""
        # Here, because a run of tests records without it.

        for fd, sock in strangers(self._births):
            self._births.setdefault(fd, self._stranger(sock))
            self._has_adopted = self._book.has_news = True
            if _file_objects(sock) > 0:
                self._with_files.add(fd)

    def _stranger(self, sock: socket.socket) -> CreationTuple:
        # Below zero: older than every mark, and never the serial of a birth.
        return unknown_creation(sock, self._next_stranger(), self._book.pid)

    def after_fork(self) -> None:
        """In the child: from now on, births are our own, and those before are inherited."""
        self._book.pid = os.getpid()
        # Another thread may have been in the middle of a sweep that nobody will finish.
        self._book.has_news = True
        for tally in (self._born, self._drops, self._failed):
            tally.after_fork()


def _nothing() -> None:
    pass


def _may_be_open(fd: int, story: CreationTuple) -> bool:
    sock = story[SOCK]()
    if sock is None:
        # The collector may be about to finalize it.
        return socket_inode_of(fd) is not None
    return _fileno(sock) >= 0


_listening: weakref.WeakSet[Registry] = weakref.WeakSet()


@in_child
def _after_fork() -> None:
    patch.after_fork()
    for registry in list(_listening):
        registry.after_fork()


def unfinished(registry: Registry, since: int) -> list[Creation]:
    """Births after a mark whose sockets are open at this moment, or were dropped while open."""
    living = registry.living(thorough=True).stories.values()
    dropped = (drop.story for drop in registry.dropped())
    return [Creation._make(story) for story in (*living, *dropped) if story[SERIAL] > since]
