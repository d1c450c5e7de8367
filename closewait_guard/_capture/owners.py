"""The weak table of owners of sockets: sessions, clients, loops that were made or ended unclosed.

Nothing here takes a lock: an owner may be made and finalized anywhere, as a socket may be.
"""

from __future__ import annotations

import _socket
import functools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from closewait_guard._capture import patch
from closewait_guard._capture.checkouts import CheckoutTable, answer_of
from closewait_guard._capture.context import PlainContext
from closewait_guard._capture.creation import PID, SERIAL, SOCK, STACK, CreationTuple, with_serial
from closewait_guard._capture.dropped import (
    MAX_COLLECTION,
    DroppedSocket,
    LockFreeCounter,
    is_left_to_exit,
)
from closewait_guard._capture.owner_hooks import (
    OwnerEvents,
    objects_being_made,
    owner_wrappers,
    pool_wrappers,
)
from closewait_guard._capture.recorder import Recording, make_recorder
from closewait_guard._clock import now
from closewait_guard._descriptors import ask_or_none, peer_at
from closewait_guard._libraries import MAX_CONNECTIONS, connections_of
from closewait_guard._live import find_classes

if TYPE_CHECKING:
    from closewait_guard._libraries import CheckoutKind, OwnerKind

__all__ = [
    "EndedOwner",
    "OpenOwner",
    "OwnedSocket",
    "OwnerTable",
]


class OpenOwner(NamedTuple):
    """An owner that was made, by weak reference, and its kind."""

    creation: CreationTuple
    kind: OwnerKind

    def has_unrecorded(self, owner: object, *, native: bool) -> bool:
        """Whether it has what is no socket object: sockets of C code; also pipes, unless native."""
        # A connection of C code is a number. What the others lead to is not asked: a run of tests
        # asks all owners again after each test that has left something.
        connections = islice(self.kind.connections(owner), MAX_CONNECTIONS)
        has_native = any(type(each) is int for each in connections)
        return has_native or (not native and any(self.kind.descriptors(owner)))


class OwnedSocket(NamedTuple):
    """An open socket of an owner.

    Attributes:
        fd: Its number; -1 if the collector has closed it just before.
        serial: That of its record; None where it has none, as those that C code has opened.
        peer: The address that it was connected to, as the kernel gives it.
    """

    fd: int
    serial: int | None
    peer: object


class EndedOwner(NamedTuple):
    """An owner that was finalized without its close.

    Attributes:
        collected: The collector found it, rather than its last reference going away.
        is_left_to_exit: It was kept for a thread that has ended because the program does.
        sockets: Its open sockets.
        descriptors: How many others it had, by kind.
    """

    creation: CreationTuple
    kind: OwnerKind
    collected: bool
    is_left_to_exit: bool
    sockets: tuple[OwnedSocket, ...]
    descriptors: Mapping[str, int]

    @property
    def serial(self) -> int:
        """Its own."""
        serial: int = self.creation[SERIAL]
        return serial

    @property
    def serials(self) -> frozenset[int]:
        """Those of its sockets that are recorded."""
        return frozenset(each.serial for each in self.sockets if each.serial is not None)


class _Sockets(Protocol):
    """What is needed of the registry."""

    @property
    def next_serial(self) -> Callable[[], int]: ...
    def serial_at(self, fd: int) -> int | None: ...
    def dropped_just_now(self, sock: _socket.socket) -> DroppedSocket | None: ...
    def on_error(self) -> None: ...


class OwnerTable(OwnerEvents):
    """Records what is meant to be closed when it is made, and notes what ends without that.

    Args:
        recording: How to record.
        context: Calls the program's context provider, if it has one.
        most: How many that have ended are kept.
        sockets: Knows those that are open, and the series of numbers for both.

    Attributes:
        ended: The latest of those that were finalized without their close.
        tracked: The classes whose objects are recorded.
        counter: Counts those that were made, and what was taken from pools.
        checkouts: Records what is taken from pools.
    """

    def __init__(
        self,
        recording: Recording,
        context: PlainContext | None,
        most: int,
        sockets: _Sockets,
    ) -> None:
        self.ended: deque[EndedOwner] = deque(maxlen=most)
        self.tracked: list[tuple[type, OwnerKind]] = []
        self.counter, self._count_ended = LockFreeCounter(), LockFreeCounter()
        self._sockets, self._speedups = sockets, recording.speedups
        # By identity, how each was made; and its number and kind.
        self._creations: dict[int, CreationTuple] = {}
        self._made: dict[int, tuple[int, OwnerKind]] = {}
        # By its number: since when the weak reference to one is dead.
        self._gone: dict[int, float] = {}
        # By identity of a part: that of the owner that has it, and the owner's number.
        self._owner_of_part: dict[int, tuple[int, int]] = {}
        self._recorder = make_recorder(self._creations, {}, context, recording, id)
        self._record = self._recorder.on_create
        self._next_serial, self._count = sockets.next_serial, self.counter.count
        self.checkouts = CheckoutTable(recording, context, self.counter, sockets)

    def track(self, cls: type, kind: OwnerKind) -> None:
        """Record the owners of a class from now on."""
        self.tracked.append((cls, kind))
        patch.subscribe_owners(self)
        patch.patch_methods(cls, owner_wrappers(kind), speedups=self._speedups)

    def listen_to_pools(self, cls: type, kind: CheckoutKind) -> None:
        """Record what the pools of a class hand out from now on."""
        if kind.listen is not None:
            self.checkouts.listen(cls, kind)
            return
        wrappers = pool_wrappers(kind)
        classes = find_classes(wrappers)
        # If its library has other classes by now, what is taken would never be given back.
        if classes.keys() == wrappers.keys():
            patch.subscribe_owners(self)
            for name, found in classes.items():
                patch.patch_methods(found, wrappers[name], speedups=self._speedups)

    @property
    def on_make(self) -> Callable[[Any, object], None]:
        return self._record

    def on_made(self, owner: object, kind: OwnerKind) -> None:
        serial = self._next_serial()
        self._made[id(owner)] = serial, kind
        self._count()
        if kind.part is not None and (part := kind.part(owner)) is not None:
            self.on_close(part)
            self._owner_of_part[id(part)] = id(owner), serial

    def record_unfinished(self) -> None:
        """Record what the calls of this thread are making: its first socket has installed us."""
        for owner, kind, code in objects_being_made(self.tracked):
            if id(owner) not in self._made:
                self.on_make(owner, None)
                stack = self._creations[id(owner)][STACK]
                codes = stack[::2]
                del stack[: 2 * codes.index(code) if code in codes else 0]
                self.on_made(owner, kind)

    def on_close(self, owner: object) -> None:
        key = id(owner)
        self._made.pop(key, None)
        self._creations.pop(key, None)

    def on_finalize(self, owner: object) -> None:
        key = self._key_at_end(owner)
        made, creation = self._made.pop(key, None), self._creations.pop(key, None)
        if made is None or creation is None:
            return
        self._gone.pop(made[0], None)
        if made[1].closes_itself:
            return
        entry = OpenOwner(with_serial(creation, made[0]), made[1])
        if not self._is_own(entry) or entry.kind.is_closed(owner):
            return
        sockets = tuple(self.sockets_of(owner, entry.kind, just_dropped=True))
        descriptors = Counter(kind.value for kind, _ in entry.kind.descriptors(owner))
        if sockets or descriptors or not entry.kind.needs_connections:
            collected = entry.creation[SOCK]() is None
            kept = is_left_to_exit()
            self.ended.append(EndedOwner(*entry, collected, kept, sockets, descriptors))
            self._count_ended.count()

    def _key_at_end(self, owner: object) -> int:
        """By what one that is finalized is known: its own, or that of what it is a part of.

        In a reference cycle a part may be the first, and closes what the owner would be asked for.
        """
        key, serial = self._owner_of_part.pop(id(owner), (id(owner), None))
        # The owner may be gone, and something else in its place.
        is_part = serial is not None and self._made.get(key, (None,))[0] == serial
        return key if is_part else id(owner)

    def sockets_of(
        self, owner: object, kind: OwnerKind, *, just_dropped: bool = False
    ) -> Iterator[OwnedSocket]:
        """The open sockets of an owner; also those finalized before it, if `just_dropped`."""
        for fd, sock in connections_of(owner, kind):
            if sock is None:
                yield OwnedSocket(fd, None, peer_at(fd))
            elif fd >= 0:
                peer = ask_or_none(_socket.socket.getpeername, sock)
                yield OwnedSocket(fd, self._sockets.serial_at(fd), peer)
            elif just_dropped and (drop := self._sockets.dropped_just_now(sock)) is not None:
                yield OwnedSocket(fd, drop.creation[SERIAL], drop.snapshot.peer)

    def _is_own(self, entry: OpenOwner) -> bool:
        """Whether it is to be closed here: a fork has copied those of the parent."""
        made_in: int = entry.creation[PID]
        return made_in == self._recorder.pid

    @property
    def on_take(self) -> Callable[[CheckoutKind, object, object], None]:
        return self.checkouts.take

    @property
    def on_give_back(self) -> Callable[[CheckoutKind, object], None]:
        return self.checkouts.give_back

    @property
    def forgotten(self) -> int:
        """How many of those that ended without their close had to make room for later ones."""
        return self._count_ended.total() - len(self.ended)

    def on_error(self) -> None:
        self._sockets.on_error()

    def open_owners(self) -> list[tuple[object, OpenOwner]]:
        """Those that were not closed yet, as far as is known: one that cannot be asked may be open.

        The caller lets go of them soon.
        """
        found = []
        for key, entry in self._entries():
            owner = entry.creation[SOCK]()
            if owner is None:
                self._forget_if_gone(key, entry)
            elif self._is_own(entry) and not answer_of(
                entry.kind.is_closed, owner, otherwise=False
            ):
                found.append((owner, entry))
        return found

    def _forget_if_gone(self, key: int, entry: OpenOwner) -> None:
        """Forget one whose finalizer does not come: that of a subclass calls none of ours.

        The collector clears the weak references to all that it takes before the first finalizer,
        which may close an event loop, and so have us look.
        """
        serial = entry.creation[SERIAL]
        if now() - self._gone.setdefault(serial, now()) > MAX_COLLECTION:
            self._made.pop(key, None)
            self._creations.pop(key, None)
            self._gone.pop(serial, None)

    def owner_of(self, serial: int) -> Any:
        """The owner with a number, if it is still there."""
        creations = (entry.creation for _, entry in self._entries())
        return next((each[SOCK]() for each in creations if each[SERIAL] == serial), None)

    def has_left_any(self, since: int) -> bool:
        """Whether an owner has ended unclosed, or may have; or a connection taken since is out."""
        is_any = bool(self.ended) or self.checkouts.has_any_out(since)
        return is_any or bool(self.unrecorded(since))

    def unrecorded(self, mark: float, *, native: bool = False) -> list[tuple[object, OpenOwner]]:
        """The open ones made after a mark that have what is no socket object, or may have."""
        if not any(serial > mark for serial, _ in self._made.copy().values()):
            return []
        made = [each for each in self.open_owners() if each[1].creation[SERIAL] > mark]
        return [
            (owner, entry)
            for owner, entry in made
            if answer_of(
                functools.partial(entry.has_unrecorded, native=native), owner, otherwise=True
            )
        ]

    def creations_left(self, since: float) -> list[CreationTuple]:
        """Of those that ended unclosed or have sockets of C code, and of what is out of a pool."""
        left = [each.creation for each in self.ended.copy()]
        left += [each.creation for each in self.checkouts.open_checkouts()]
        return left + [each.creation for _, each in self.unrecorded(since, native=True)]

    def _entries(self) -> Iterator[tuple[int, OpenOwner]]:
        made = self._made.copy()
        for key, creation in self._creations.copy().items():
            if key in made:
                yield key, OpenOwner(with_serial(creation, made[key][0]), made[key][1])

    def after_fork(self) -> None:
        """In the child: those that have ended are the parent's."""
        self._recorder.pid = os.getpid()
        self.counter.after_fork()
        self._count_ended.after_fork()
        self.ended.clear()
        self.checkouts.after_fork()
