"""The weak table of sockets: which were opened, which are open, which were dropped while open.

Creations are kept by descriptor, each with a weak reference to its socket: the kernel hands a
number out again only when its last owner is closed, so a new creation always replaces that of a
closed socket. Nothing here takes a lock: sockets are created and finalized inside finalizers and
signal handlers too.
"""

from __future__ import annotations

import _socket
import itertools
import math
import os
import socket
import weakref
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

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
    OpenSockets,
    SocketsAtFork,
    closed_among,
    count_files,
    is_made_by,
    library_constructors,
    may_be_open,
    no_socket,
    pop_if_same,
    still_owns,
    unknown_creation,
    untracked_sockets,
    was_closed,
)
from closewait_guard._capture.dropped import (
    DroppedSocket,
    DroppedSockets,
    EndedCreations,
    LockFreeCounter,
    is_garbage,
)
from closewait_guard._capture.hooks import caller_of_hooks
from closewait_guard._capture.recorder import Recording, make_recorder
from closewait_guard._clock import now
from closewait_guard._descriptors import inode_of
from closewait_guard._enums import Origin
from closewait_guard._libraries import (
    OWNER_CLASSES,
    POOL_CLASSES,
    SOCKET_CLASSES,
    SOCKET_CONSTRUCTORS,
    DeclaredKinds,
    kind_of_owner,
    kind_of_pool,
)
from closewait_guard._live import find_classes
from closewait_guard._threads import ForkPoint, in_child, in_parent

if TYPE_CHECKING:
    from closewait_guard._capture.owners import OwnerTable
    from closewait_guard._libraries import OwnerKind

__all__ = [
    "Registry",
    "open_creations",
    "open_without_socket",
]


_fileno = _socket.socket.fileno


class _Sweep(NamedTuple):
    """The creations that a sweep has left, and the state of the table before it."""

    state: object
    creations: dict[int, CreationTuple]


class Registry:
    """Records what happens to sockets, and knows which are open.

    Attributes:
        context: What calls the program's context provider, if it has one.
        alarms: What to call when there is no descriptor left.
        owners: Records owners of sockets and what pools hand out, if a library has such.
        at_fork: Those that children may have copies of.
        has_failed: Something could not be recorded, and nothing has been said of it.
        fork: Where this process was forked, if it was while sockets were recorded.
        made_at: When it was made, by `now()`; it may be scanned much later.
    """

    def __init__(
        self, recording: Recording, context: PlainContext | None, max_dropped: int
    ) -> None:
        self.context = context
        self.made_at = now()
        self.alarms: list[Callable[[], None]] = []
        self.fork: ForkPoint | None = None
        # By descriptor; and those whose sockets were detached from it.
        self._creations: dict[int, CreationTuple] = {}
        self._detached: dict[int, tuple[CreationTuple, int]] = {}
        # Another object after each change but a creation.
        self._changed = object()
        self._recorder = make_recorder(self._creations, self._detached, context, recording)
        self.on_create = self._recorder.on_create
        self._opened, self._failures = LockFreeCounter(self._recorder.count), LockFreeCounter()
        self._dropped = DroppedSockets(max_dropped)
        self._last = _Sweep(object(), {})
        self._ended = EndedCreations()
        self._has_adopted = False
        self._with_files: set[int] = set()
        self._next_adopted = itertools.count(-1, -1).__next__
        self.at_fork, self.has_failed = SocketsAtFork(self._creations), False
        self.owners: OwnerTable | None = None
        self._on_import: tuple[patch.CallOnImport, ...] = ()
        self.declared = DeclaredKinds(self._wait_for, self.patch_owner_class)
        self._recording, self._max_dropped = recording, max_dropped
        # A number above the serial of every socket opened so far, and below the next.
        self.mark = self._opened.mark
        self.next_serial, self.dropped_just_now = self._recorder.count, self._dropped.find_recent

    def subscribe(self) -> None:
        """Record from now on. Idempotent."""
        with patch.install_lock():
            _subscribed.add(self)
            patch.subscribe(self, speedups=self._recording.speedups)
            if not self._on_import:
                calls = (
                    (self.patch_class, SOCKET_CLASSES),
                    (self.patch_owner_class, OWNER_CLASSES),
                    (self.listen_to_pools, POOL_CLASSES),
                )
                self._on_import = tuple(patch.CallOnImport(*each).install() for each in calls)
                self.declared.begin()

    def patch_class(self, name: str) -> None:
        """Record the sockets of a library's own class too, `module:name`, if it is loaded."""
        library_constructors.update(SOCKET_CONSTRUCTORS)
        for cls in find_classes([name]).values():
            patch.patch_class(cls, name.partition(":")[0], speedups=self._recording.speedups)

    def patch_owner_class(self, name: str) -> None:
        """Record the owners of a class, `module:name`, if it is loaded."""
        for cls in find_classes([name]).values():
            if cls.__weakrefoffset__:
                self.track(cls, self.declared.kinds.get(name) or kind_of_owner(name))

    def _wait_for(self, *call: Any) -> None:
        self._on_import += (patch.CallOnImport(*call).install(),)

    def track(self, cls: type, kind: OwnerKind) -> None:
        """Record the owners of a class from now on."""
        self._load_owners().track(cls, kind)

    def listen_to_pools(self, name: str) -> None:
        """Record what the pools of a class, `module:name`, hand out, if it is loaded."""
        for cls in find_classes([name]).values():
            self._load_owners().listen_to_pools(cls, kind_of_pool(name))

    def _load_owners(self) -> OwnerTable:
        # Most programs have none: what records them is loaded with the first such class.
        from closewait_guard._capture.owners import OwnerTable

        if self.owners is None:
            self.owners = OwnerTable(self._recording, self.context, self._max_dropped, self)
        return self.owners

    def unsubscribe(self) -> None:
        """Record no more."""
        with patch.install_lock():
            _subscribed.discard(self)
            for each in self._on_import:
                each.remove()
            self._on_import = ()
            patch.unsubscribe(self)
            if self.owners is not None:
                patch.unsubscribe_owners(self.owners)
                self.owners.checkouts.stop()

    # Called by the patched methods.

    def on_makefile(self, sock: socket.socket) -> None:
        self._with_files.add(_fileno(sock))

    def on_detach(self, sock: socket.socket, fd: int) -> None:
        creation = self._creations.get(fd)
        if creation is None or creation[OBJECT_ID] != id(sock):
            return
        parent = creation[PARENT]
        if creation[ORIGIN] is Origin.WRAPPED and parent is not None and still_owns(parent, fd):
            self._creations[fd] = parent
            self._changed = object()
        elif creation[ORIGIN] is Origin.ADOPTED and is_made_by(creation, caller_of_hooks()):
            # Code in C has made a socket of a number for a single question, as uvloop does.
            pop_if_same(self._creations, fd, creation)
            self._changed = object()
        elif (inode := inode_of(fd)) is not None:
            self._detached[fd] = (creation, inode)

    def on_finalize(self, sock: socket.socket, fd: int) -> None:
        creation = self._creations.get(fd)
        if creation is None or creation[OBJECT_ID] != id(sock):
            creation = self._adopted_creation(sock)
        # In this order, so that another thread finds it among the open or the dropped.
        self._dropped.add(creation, sock, fd)
        pop_if_same(self._creations, fd, creation)
        self._changed = object()

    def on_close_in_collection(self, sock: socket.socket, fd: int) -> None:
        creation = self._creations.get(fd)
        if creation is not None and creation[OBJECT_ID] == id(sock) and is_garbage(creation, sock):
            self.on_finalize(sock, fd)

    def on_fd_exhausted(self) -> None:
        for alarm in self.alarms.copy():
            alarm()

    def on_error(self) -> None:
        self.has_failed = True
        self._failures.count()

    # Called by scans.

    def open_sockets(self, *, thorough: bool = False) -> OpenSockets:
        """The sockets that are open at this moment.

        With many sockets most of the time goes into touching each one's objects. That is done
        only if a socket was created since it was done last; otherwise the closed ones stay in
        until a poll shows that their numbers are free, and `discard` is called.
        """
        last = self._last
        if self._state() != last.state or thorough:
            last = self._last = self._sweep()
        return OpenSockets(last.creations, self._close_called(), self._still_detached())

    def _state(self) -> tuple[int, object]:
        """Another one after each change."""
        return self._recorder.last_serial, self._changed

    def _sweep(self) -> _Sweep:
        # Before the sweep: a socket that is created meanwhile outdates it.
        state = self._state()
        creations = self._creations.copy()
        for fd in closed_among(creations):
            if fd not in self._detached and not self._keeps_descriptor(fd, creations[fd]):
                creation = creations.pop(fd)
                if self._ended.has_ended(fd, creation):
                    pop_if_same(self._creations, fd, creation)
        self._ended.keep_only(self._creations)
        return _Sweep(state, creations)

    def discard(self, fd: int, creation: CreationTuple) -> None:
        """Remove a creation whose descriptor is closed."""
        if fd not in self._detached:
            pop_if_same(self._creations, fd, creation)
        self._changed = object()

    def _close_called(self) -> set[int]:
        """Descriptors that outlived a `close()`, because a file object keeps them."""
        creations, still = self._creations, set()
        for fd in self._with_files.copy():
            creation = creations.get(fd)
            sock = None if creation is None else creation[SOCK]()
            if creation is None or sock is None or _fileno(sock) != fd:
                self._with_files.discard(fd)
                if creations.get(fd) is not creation:
                    # Created meanwhile, and it may have a file by now.
                    self._with_files.add(fd)
            elif was_closed(sock) and self._keeps_descriptor(fd, creation):
                still.add(fd)
        return still

    def _keeps_descriptor(self, fd: int, creation: CreationTuple) -> bool:
        """Whether a closed socket is open all the same, and not just a bytecode from its end."""
        sock = creation[SOCK]()
        return sock is not None and _fileno(sock) == fd and count_files(sock) > 0

    def _still_detached(self) -> set[int]:
        """Descriptors that left their socket object and are still open, by their inode."""
        still: set[int] = set()
        for fd, entry in self._detached.copy().items():
            creation, inode = entry
            if self._creations.get(fd) is creation and inode_of(fd) == inode:
                still.add(fd)
            else:
                pop_if_same(self._detached, fd, entry)
        return still

    def all_closed_since(self, since: int) -> bool:
        """Whether no socket opened after a mark is open, or was dropped. False may be wrong."""
        if self._detached or self.has_failed or self.at_fork.copied_after(since):
            return False
        for fd, creation in self._creations.copy().items():
            if creation[SERIAL] > since and may_be_open(fd, creation):
                return False
        # Last, for what another thread's collection drops meanwhile.
        return not self._dropped.recent and not (self.owners and self.owners.has_left_any(since))

    def last_serial(self) -> int:
        """The serial of the latest creation: a mark for `all_closed_since` that takes no lock.

        Where threads race it may be that of one before; a mark too low does no harm.
        """
        return self._recorder.last_serial

    def socket_of(self, fd: int, serial: int) -> socket.socket | None:
        """The socket of a record, if it is still there."""
        creation = self._creations.get(fd)
        return None if creation is None or creation[SERIAL] != serial else creation[SOCK]()

    def serial_at(self, fd: int) -> int | None:
        """The serial of the latest socket with a descriptor; None if none is recorded."""
        creation = self._creations.get(fd)
        return None if creation is None else creation[SERIAL]

    def is_tracked(self, fd: int, since: float = math.inf) -> bool:
        """Whether a number is that of a socket object, has left one, or was one's after a mark."""
        creation = self._creations.get(fd)
        return creation is not None and (
            creation[SERIAL] > since or fd in self._detached or still_owns(creation, fd)
        )

    def dropped(self) -> tuple[DroppedSocket, ...]:
        """The latest of the sockets that were finalized while open."""
        return self._dropped.as_tuple()

    def totals(self) -> tuple[int, int, int]:
        """How many were recorded when opened, how many dropped, and how many records failed."""
        opened = self._opened.total() - (self.owners.counter.total() if self.owners else 0)
        return opened, self._dropped.counter.total(), self._failures.total()

    def is_open(self, fd: int, serial: int) -> bool:
        """Whether the socket of a creation is still open, or a connection still out of its pool."""
        creation = self._creations.get(fd)
        if creation is not None and creation[SERIAL] == serial:
            return fd in self._last.creations
        return self.owners is not None and self.owners.checkouts.is_out(serial)

    @property
    def pid(self) -> int:
        """The process in which sockets are recorded."""
        return self._recorder.pid

    def last_open(self) -> Iterable[CreationTuple]:
        """The sockets that the last scan has found open."""
        return self._last.creations.values()

    def count_adopted(self) -> int:
        """How many of the open sockets are older than the guard."""
        if not self._has_adopted:
            return 0
        return sum(creation[ORIGIN] is Origin.ADOPTED for creation in self.last_open())

    # Of sockets that were there before, and after a fork.

    def adopt(self) -> None:
        """Take in every open socket object whose creation is not recorded here."""
        others = [each for each in list(_subscribed) if each is not self]
        classes = find_classes(SOCKET_CLASSES).values()
        for fd, sock in untracked_sockets(self._creations, classes):
            creation = self._adopted_creation(sock)
            for other in others:
                known = other._creations.get(fd)
                if known is not None and known[OBJECT_ID] == id(sock):
                    creation = (*known[:SERIAL], creation[SERIAL], *known[SERIAL + 1 :])
            self._creations.setdefault(fd, creation)
            self._has_adopted = True
            self._changed = object()
            if count_files(sock) > 0:
                self._with_files.add(fd)

    def _adopted_creation(self, sock: socket.socket) -> CreationTuple:
        # Below zero: older than every mark, and never the serial of a recorded creation.
        return unknown_creation(sock, self._next_adopted(), self._recorder.pid)

    def after_fork(self) -> None:
        """In the child: sockets opened from now on are our own, those before are inherited."""
        self._recorder.pid = os.getpid()
        self.fork = ForkPoint.here()
        # Another thread may have been in the middle of a sweep, which will never be finished.
        self._changed = object()
        for counter in (self._opened, self._dropped, self._failures):
            counter.after_fork()
        self.at_fork = SocketsAtFork(self._creations)
        if self.owners is not None:
            self.owners.after_fork()


_subscribed: weakref.WeakSet[Registry] = weakref.WeakSet()


@in_child
def _after_fork() -> None:
    patch.after_fork()
    for registry in list(_subscribed):
        registry.after_fork()


@in_parent
def _after_fork_in_parent() -> None:
    for registry in list(_subscribed):
        # In the middle of the program's own call.
        with suppress(Exception):
            registry.at_fork.note()


def open_without_socket(registry: Registry, serials: Set[int]) -> dict[int, int]:
    """By descriptor, which of the creations are open after their descriptor left the socket."""
    return {
        fd: creation[SERIAL]
        for fd, creation in registry.open_sockets().creations.items()
        if creation[SERIAL] in serials and not still_owns(creation, fd)
    }


def open_creations(registry: Registry, since: float) -> list[Creation]:
    """Those after a mark whose sockets are open at this moment, or were dropped while open.

    Also those that this process has closed and a child may have a copy of. Cheap, because nothing
    asks the kernel.
    """
    still_open = registry.open_sockets(thorough=True).creations.values()
    dropped = [each.creation for each in registry.dropped()]
    if registry.owners is not None:
        dropped += registry.owners.creations_left(since)
    found = [
        Creation._make(creation) for creation in (*still_open, *dropped) if creation[SERIAL] > since
    ]
    copied = registry.at_fork.copied_after(since).values()
    # What refers to the object of one that is closed here keeps nothing open.
    return found + [Creation._make(each.creation)._replace(sock=no_socket) for each in copied]
