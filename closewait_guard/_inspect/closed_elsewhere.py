"""Descriptors that were closed by something else than their socket objects, as by `os.close()`.

The number soon belongs to another file: what the kernel says of it does not apply to the object,
whose `close()` will close the other one. The inode that was noted when a scan saw the socket for
the first time distinguishes the two.

And copies of connections over `fork()` that only this process keeps open, because the parent has
closed its own: the peer waits for an end that does not come.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import FrameType
from typing import NamedTuple, Protocol

from closewait_guard._capture import (
    ORIGIN,
    PID,
    SERIAL,
    SOCK,
    CreationTuple,
    OpenSockets,
    pop_if_same,
    still_owns,
)
from closewait_guard._clock import now
from closewait_guard._descriptors import inode_of, sockets_of_process, tcp_info_of
from closewait_guard._format import pluralize
from closewait_guard._inspect.native import SETTLED_AFTER
from closewait_guard._inspect.observation import is_unused_since
from closewait_guard._inspect.probe import (
    INVALID,
    Endpoint,
    ProbeResult,
    endpoint_of,
    has_sent,
    peer_of,
)
from closewait_guard._inspect.records import is_ours
from closewait_guard._live import (
    locals_of,
    locals_of_other_thread,
    running_frames,
    sees_all_threads,
    shows_other_threads,
)
from closewait_guard._threads import ForkPoint, waiting_calls_of
from closewait_guard.model import Origin

__all__ = [
    "ClosedElsewhere",
    "ForeignClose",
    "Forked",
    "ForkedCopies",
]


# How a socket comes to a number that the kernel has chosen, because it was free.
_BY_KERNEL = frozenset({Origin.CREATED, Origin.ACCEPTED, Origin.DUPLICATED})


class ForeignClose(NamedTuple):
    """A socket object that is open as far as it knows, and the number that is no longer its own."""

    creation: CreationTuple
    fd: int
    inode: int | None

    def endpoint(self) -> Endpoint | None:
        """What the object itself knows; None if it is gone."""
        sock = self.creation[SOCK]()
        if sock is None:
            return None
        return endpoint_of(sock, self.fd)._replace(local=None, peer=None, inode=self.inode)


_InodeNote = tuple[CreationTuple, int | None]


class _InodeTable(NamedTuple):
    """The inodes of the sockets that one scan took to be open."""

    creations: Mapping[int, CreationTuple]
    inodes: Mapping[int, _InodeNote]


class ClosedElsewhere:
    """Notes inodes, and finds the descriptors that have another by now. Holds no socket.

    Scans in several threads may differ in what is open, so each uses a table of its own: it is
    replaced as a whole, and what was found is kept entry by entry.
    """

    def __init__(self) -> None:
        self._table = _InodeTable({}, {})
        self._found: dict[int, ForeignClose] = {}

    def detect(
        self,
        creations: Mapping[int, CreationTuple],
        events: Mapping[int, int],
        to_describe: Collection[int],
    ) -> set[int]:
        """The numbers that are not those of their sockets any more.

        Args:
            creations: All that are taken to be open; the same object while there is nothing new.
            events: What has happened to them.
            to_describe: Those that are going to be described.
        """
        table = self._table
        if creations is not table.creations:
            table = self._table = _InodeTable(creations, self._note_inodes(creations, table.inodes))
        inodes = table.inodes
        # An object that is closing lets go of the number before the kernel does.
        closed = {
            fd
            for fd in to_describe
            if fd in inodes
            and (inode_of(fd) != inodes[fd][1] or events.get(fd, 0) & INVALID)
            and still_owns(creations[fd], fd)
        }
        for fd in closed:
            self._add(creations[fd], fd, table.inodes[fd][1])
        return closed

    def _note_inodes(
        self, creations: Mapping[int, CreationTuple], before: Mapping[int, _InodeNote]
    ) -> Mapping[int, _InodeNote]:
        inodes: dict[int, _InodeNote] = {}
        for fd, creation in creations.items():
            known = before.get(fd)
            if known is not None and known[0] is creation:
                inodes[fd] = known
                continue
            if known is not None and _has_taken(creation, known[0]) and still_owns(known[0], fd):
                self._add(known[0], fd, known[1])
            inodes[fd] = (creation, inode_of(fd))
        return inodes

    def _add(self, creation: CreationTuple, fd: int, inode: int | None) -> None:
        self._found.setdefault(creation[SERIAL], ForeignClose(creation, fd, inode))

    def current(self) -> Iterator[ForeignClose]:
        """Those whose objects are still there, and have not been closed."""
        for serial, foreign_close in self._found.copy().items():
            if still_owns(foreign_close.creation, foreign_close.fd):
                yield foreign_close
            else:
                pop_if_same(self._found, serial, foreign_close)


def _has_taken(newer: CreationTuple, older: CreationTuple) -> bool:
    """Whether the kernel has given one socket the number of another that was opened before."""
    return newer[ORIGIN] in _BY_KERNEL and bool(newer[SERIAL] > older[SERIAL])


# The share of the time that listing the parent's descriptors may take.
_MAX_CPU_SHARE = 0.002
_MAX_DESCRIPTORS = 20_000


class Forked(Protocol):
    """What is asked of a source of creations."""

    @property
    def fork(self) -> ForkPoint | None: ...


class ForkedCopies:
    """Finds copies of connections whose originals the parent has closed; Linux only.

    In a process that was not forked it does nothing. A child that works on what its parent has
    accepted looks alike, so a copy counts only if the child shows no sign of use: no byte has been
    sent or received since the fork, no thread waits in the kernel for the descriptor, and no call
    that has begun since the fork has the socket among its variables. A child that was forked just
    now, or may wait for the first words of a client, may be about to use it: then a copy counts if
    the next scan sees the same.

    Args:
        source: Where creations are known.
        grace: Seconds that a child has to close its copies.

    Attributes:
        is_last: This process ends now, so that no scan is the next.
        notes: What the latest scan could not tell.
        unseen: Those of the notes that mean that a leak may be missing.
    """

    def __init__(self, source: Forked, grace: float) -> None:
        self._source = source
        self._settled_after = max(grace, SETTLED_AFTER)
        # What counts, and what of it has been unused since the fork for all that is known.
        self._found: frozenset[int] = frozenset()
        self._never_used: frozenset[int] = frozenset()
        self._candidates: frozenset[int] = frozenset()
        self._paused_until = 0.0
        self.is_last = False
        self.notes: tuple[str, ...] = ()
        self.unseen: tuple[str, ...] = ()

    def after_fork(self) -> None:
        """In the child."""
        self._found = self._never_used = self._candidates = frozenset()
        self._paused_until = 0.0
        self.notes = self.unseen = ()

    def find(self, open_sockets: OpenSockets, own: int) -> dict[int, float]:
        """The descriptors of copies that only this process has open, and does not seem to use.

        With each, for how long that has been so at least, where it was not seen to begin.

        Args:
            open_sockets: All that are open.
            own: The number of this process.
        """
        fork, started, is_last = self._source.fork, now(), self.is_last
        if fork is None:
            return {}
        if is_last or started >= self._paused_until:
            self._look(fork, open_sockets, own)
            self._paused_until = now() + (now() - started) / _MAX_CPU_SHARE
        since_fork = started - fork.at
        return {
            fd: since_fork if fd in self._never_used else 0.0
            for fd in self._found & open_sockets.creations.keys()
        }

    def _look(self, fork: ForkPoint, open_sockets: OpenSockets, own: int) -> None:
        inherited = {
            fd: creation
            for fd, creation in open_sockets.creations.items()
            if creation[PID] != own and fd not in open_sockets.detached
        }
        kept = _kept_by(fork.parent, inherited) if inherited else set[int]()
        # Whoever is not the child of its parent any more was made to live on by itself.
        is_child = fork.parent == os.getppid()
        left = inherited.keys() - kept if kept is not None and is_child else set[int]()
        if left:
            used, waited_for = _objects_since(fork), _waited_for()
            left = {fd for fd in left - waited_for if id(inherited[fd][SOCK]()) not in used}
        never_used = frozenset[int]()
        if self.is_last or now() - fork.at >= self._settled_after:
            never_used = frozenset(fd for fd in left if not _may_wait_for_first(inherited[fd]))
        seen_twice = frozenset() if self.is_last else self._candidates & left
        self._found, self._never_used = never_used | seen_twice, never_used
        self._candidates = frozenset(left)
        unknown = _count(inherited.values(), _has_peer) if kept is None and is_child else 0
        undecided = [] if self.is_last else [inherited[fd] for fd in left - self._found]
        self.unseen = _note_on_parent(unknown)
        self.notes = (*self.unseen, *_note_on_use(_count(undecided, _is_established)))

    def is_unused(self, result: ProbeResult) -> bool:
        """Whether a connection is up, and no byte has been sent or received since the fork."""
        fork = self._source.fork
        return fork is not None and is_unused_since(result, now() - fork.at)


def _kept_by(parent: int, fds: Collection[int]) -> set[int] | None:
    """Those that the parent has open too; None where its descriptors cannot be read."""
    try:
        count, sockets = sockets_of_process(parent, at_most=_MAX_DESCRIPTORS)
    except OSError:
        return None
    if count > _MAX_DESCRIPTORS:
        return None
    if not _sees_all_variables():
        # A report says so anyway.
        return set(fds)
    inodes = set(sockets.values())
    return {fd for fd in fds if inode_of(fd) in inodes}


# What `struct tcp_info` begins with.
_ESTABLISHED = b"\x01"


def _note_on_parent(connections: int) -> tuple[str, ...]:
    """What to say of a parent whose descriptors cannot be read."""
    if not connections:
        return ()
    return (
        f"whether the parent process, {os.getppid()}, has closed its copies of "
        f"{pluralize(connections, 'connection')} from before the fork: its descriptors cannot be "
        "read",
    )


def _note_on_use(connections: int) -> tuple[str, ...]:
    """What to say of those that were seen for the first time that only this process has open."""
    if not connections:
        return ()
    return (
        f"whether this process uses {pluralize(connections, 'connection')} from before its fork, "
        "which the parent has closed: a later scan shows it",
    )


def _may_wait_for_first(creation: CreationTuple) -> bool:
    """Whether a child may have served a client that has asked for nothing yet."""
    sock = creation[SOCK]() if creation[ORIGIN] == Origin.ACCEPTED else None
    return sock is not None and not has_sent(tcp_info_of(sock))


def _count(creations: Iterable[CreationTuple], matches: Callable[[socket.socket], bool]) -> int:
    socks = (creation[SOCK]() for creation in creations)
    return sum(sock is not None and matches(sock) for sock in socks)


def _has_peer(sock: socket.socket) -> bool:
    return peer_of(sock) is not None


def _is_established(sock: socket.socket) -> bool:
    """Whether its peer has not closed: the others are judged by that."""
    return tcp_info_of(sock)[:1] == _ESTABLISHED


def _outermost_first(frame: FrameType | None) -> list[FrameType]:
    calls: list[FrameType] = []
    while frame is not None:
        calls.append(frame)
        frame = frame.f_back
    return calls[::-1]


def _sees_all_variables() -> bool:
    return sees_all_threads() and (shows_other_threads() or len(running_frames()) == 1)


def _objects_since(fork: ForkPoint) -> set[int]:
    """The identities of all variables of the program's calls that have begun since a fork."""
    own = threading.get_ident()
    return {
        id(value)
        for thread, frame in running_frames().items()
        for call in _calls_since(fork, thread, frame)
        if not is_ours(call.f_code.co_filename)
        for value in (locals_of if thread == own else locals_of_other_thread)(call).values()
    }


def _calls_since(fork: ForkPoint, thread: int, frame: FrameType) -> list[FrameType]:
    """In the thread that has forked, those within the first call that has gone on since."""
    calls = _outermost_first(frame)
    if thread != fork.thread:
        return calls
    for number, (call, (code, offset)) in enumerate(zip(calls, fork.calls, strict=False)):
        if call.f_code is not code or call.f_lasti != offset:
            return calls[number + 1 :]
    return calls[len(fork.calls) :]


def _waited_for() -> set[int]:
    try:
        return waiting_calls_of("self").fds
    except OSError:
        return set()
