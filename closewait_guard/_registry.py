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
from dataclasses import replace
from types import FrameType
from typing import Any, NamedTuple

from closewait_guard._context import PlainContext
from closewait_guard._labels import current_labels
from closewait_guard._patch import CALLER, SOCKET
from closewait_guard._probe import Probe, View
from closewait_guard._stack import NO_STACK, Stack, capture, resolve, settle
from closewait_guard._tally import Tally
from closewait_guard.model import Origin, Scalar, SocketRecord

__all__ = ["Birth", "Drop", "Living", "Registry"]

# Bounds what `sock = sock.dup()` in a loop can pile up; the root of the line is always kept.
_MOST_ANCESTORS = 16

# Which function of the standard library makes a socket of a descriptor, and which of its local
# variables tells whose. By the identity of the code, because a code object hashes its constants.
_MAKERS: dict[int, tuple[Origin, str | None]] = {
    id(function.__code__): origin_and_name
    for function, origin_and_name in (
        (SOCKET.accept, (Origin.ACCEPTED, "self")),
        (SOCKET.dup, (Origin.DUPLICATED, "self")),
        (socket.fromfd, (Origin.DUPLICATED, "fd")),
        (socket.socketpair, (Origin.CREATED, None)),
    )
}

_SETTLE_AFTER = 256

_CREATED = Origin.CREATED
_NO_CONTEXT: dict[str, Scalar] = {}

_fileno = _socket.socket.fileno
_close_called = SOCKET.__dict__["_closed"].__get__


# The fields of a Birth in their order, as they are kept.
_Story = tuple[Any, ...]


class Birth(NamedTuple):
    """What is remembered of a socket until somebody asks. Outlives the socket, never holds it."""

    socket: weakref.ref[socket.socket]
    # The address tells a socket whose weak references the collector has already cleared.
    key: int
    serial: int
    pid: int
    born_at: float | None
    thread: str
    task: str | None
    labels: tuple[str, ...]
    context: dict[str, Scalar]
    origin: Origin
    parent: _Story | None
    stack: Stack


_SOCKET, _KEY, _SERIAL, _ORIGIN, _PARENT, _STACK = (
    Birth._fields.index(name) for name in ("socket", "key", "serial", "origin", "parent", "stack")
)


class Drop(NamedTuple):
    """A socket that was finalized while it was open, and the kernel's last word on it."""

    birth: Birth
    fd: int
    collected: bool
    view: View | None


class Living(NamedTuple):
    """One moment's open sockets, by descriptor."""

    stories: dict[int, _Story]
    close_called: set[int]
    detached: dict[int, Birth]

    def birth(self, fd: int) -> Birth | None:
        """The birth of one of them."""
        story = self.stories.get(fd)
        return self.detached.get(fd) if story is None else Birth._make(story)

    def born_after(self, mark: int) -> set[int]:
        """Those that are younger than a mark."""
        return {fd for fd, story in self.stories.items() if story[_SERIAL] > mark}


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
        self._births: dict[int, _Story] = {}
        self._detached: dict[int, tuple[_Story, int]] = {}
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
            origin, parent = self._lineage(fd, sys._getframe(CALLER))
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
            settle(birth[_STACK])

    def detached(self, sock: socket.socket, fd: int) -> None:
        story = self._births.get(fd)
        if story is None or story[_KEY] != id(sock):
            return
        parent = story[_PARENT]
        if story[_ORIGIN] is Origin.WRAPPED and parent is not None and _holds(parent, fd):
            self._births[fd] = parent
        else:
            self._detached[fd] = (story, os.fstat(fd).st_ino)

    def dying(self, sock: socket.socket, fd: int) -> None:
        story = self._births.get(fd)
        if story is None or story[_KEY] != id(sock):
            story = self._stranger(sock)
        else:
            # Nobody else can have been given this number: its owner is still open.
            self._births.pop(fd, None)
        # The collector clears weak references before it finalizes; a last reference that goes
        # finalizes first.
        collected = story[_SOCKET]() is None
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
            sock = story[_SOCKET]()
            if sock is None or _fileno(sock) != fd:
                del stories[fd]
                if fd not in self._detached:
                    _discard(self._births, fd, story)
                continue
            if _close_called(sock):
                close_called.add(fd)
        sock = None
        return Living(stories, close_called, self._still_detached())

    def _still_detached(self) -> dict[int, Birth]:
        """Descriptors that left their socket object and are still open, told by their inode."""
        still: dict[int, Birth] = {}
        for fd, entry in self._detached.copy().items():
            story, inode = entry
            if self._births.get(fd) is story and _inode(fd) == inode:
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
        """The public record of a birth, with its stack resolved."""
        fields = birth._asdict()
        del fields["socket"], fields["key"]
        if birth.parent is not None:
            fields["parent"] = self.record_of(Birth._make(birth.parent))
        record = SocketRecord(**fields | {"stack": resolve(birth.stack)})
        if birth.pid == self._pid:
            return record
        return replace(record, pid=self._pid, origin=Origin.INHERITED, parent=record)

    def adopted_now(self) -> int:
        """How many of the open sockets are older than the guard."""
        if not self._has_adopted:
            return 0
        return sum(story[_SERIAL] < 0 for story in self._births.copy().values())

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
        if fd >= 0 and not (known is not None and _holds(known, fd)):
            if known is not None:
                _discard(self._births, fd, known)
            self._births.setdefault(fd, self._stranger(sock))

    def _stranger(self, sock: socket.socket) -> _Story:
        birth = Birth(
            socket=_ref(sock),
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

    # Where a descriptor comes from.

    def _lineage(self, fd: int, caller: FrameType) -> tuple[Origin, _Story | None]:
        maker = _MAKERS.get(id(caller.f_code))
        if maker is None:
            maker = _MAKERS.get(id(_beyond_init(caller).f_code))
        if maker is not None:
            origin, name = maker
            return origin, self._named_by(caller, name) if name else None
        story = self._births.get(fd)
        if story is None:
            return Origin.ADOPTED, None
        if _holds(story, fd):
            return Origin.WRAPPED, _bounded(story)
        handed = self._detached.get(fd)
        if handed is not None and handed[0] is story and handed[1] == _inode(fd):
            return Origin.DETACHED, _bounded(story)
        return Origin.ADOPTED, None

    def _named_by(self, caller: FrameType, name: str) -> _Story | None:
        """The birth of the socket, or descriptor, that a local variable of the caller holds."""
        value = _beyond_init(caller).f_locals.get(name)
        fd = _fileno(value) if isinstance(value, _c_socket) else value
        if not isinstance(fd, int):
            return None
        story = self._births.get(fd)
        return _bounded(story) if story is not None and _holds(story, fd) else None


def _beyond_init(frame: FrameType) -> FrameType:
    """Past the constructors of subclasses, to who called them."""
    while frame.f_code.co_name == "__init__" and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _holds(story: _Story, fd: int) -> bool:
    """Whether the socket of a birth is alive and this its descriptor."""
    sock = story[_SOCKET]()
    return sock is not None and _fileno(sock) == fd


def _bounded(story: _Story) -> _Story:
    if story[_PARENT] is None:
        return story
    line = [story]
    while (parent := line[-1][_PARENT]) is not None:
        line.append(parent)
    return story if len(line) <= _MOST_ANCESTORS else line[-1]


def _discard(table: dict[int, Any], key: int, value: object) -> None:
    """Remove an entry unless it has been replaced: another thread may register this moment."""
    found = table.pop(key, None)
    if found is not None and found is not value:
        table.setdefault(key, found)


def _inode(fd: int) -> int | None:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return None


def _task_name(asyncio: Any) -> str | None:
    if asyncio._get_running_loop() is None:
        return None
    task = asyncio.current_task()
    return task.get_name() if task is not None else None


# Not threading.current_thread(), which registers a dummy for every foreign thread that asks.
_threads: dict[int, Any] = threading._active  # type: ignore[attr-defined]

_c_socket = _socket.socket
_modules = sys.modules
_now = time.time
_ref = weakref.ref
