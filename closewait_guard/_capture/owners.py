"""The weak table of owners: which sessions, clients and loops were made, and which ended unclosed.

Nothing here takes a lock: an owner may be made and finalized anywhere, as a socket may be.
"""

from __future__ import annotations

import _socket
import os
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from closewait_guard._capture.context import PlainContext
from closewait_guard._capture.creation import OBJECT_ID, SERIAL, SOCK, CreationTuple
from closewait_guard._capture.dropped import DroppedSocket
from closewait_guard._capture.owner_hooks import OwnerEvents
from closewait_guard._capture.recorder import Recording, make_recorder
from closewait_guard._descriptors import ask_or_none
from closewait_guard._live import is_a, layers_of

if TYPE_CHECKING:
    from closewait_guard._libraries import OwnerKind

__all__ = [
    "EndedOwner",
    "OpenOwner",
    "OwnerTable",
    "sockets_of",
]


# Of the connections of one owner that has ended.
_MAX_CONNECTIONS = 1000

_fileno = _socket.socket.fileno


class OpenOwner(NamedTuple):
    """An owner that was made, by weak reference, and its kind."""

    creation: CreationTuple
    kind: OwnerKind


class EndedOwner(NamedTuple):
    """An owner that was finalized without its close.

    Attributes:
        collected: The collector found it, rather than its last reference going away.
        sockets: The serials of its open sockets; None for one that is not recorded.
        peers: The addresses that they were connected to, as the kernel gives them.
    """

    creation: CreationTuple
    kind: OwnerKind
    collected: bool
    sockets: tuple[int | None, ...]
    peers: tuple[object, ...]

    @property
    def serial(self) -> int:
        """Its own."""
        serial: int = self.creation[SERIAL]
        return serial

    @property
    def serials(self) -> frozenset[int]:
        """Those of its sockets that are recorded."""
        return frozenset(each for each in self.sockets if each is not None)


class _Sockets(Protocol):
    """What is needed of the registry."""

    @property
    def mark(self) -> Callable[[], int]: ...
    def serial_at(self, fd: int) -> int | None: ...
    def dropped(self) -> tuple[DroppedSocket, ...]: ...
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
    """

    def __init__(
        self,
        recording: Recording,
        context: PlainContext | None,
        most: int,
        sockets: _Sockets,
    ) -> None:
        self.ended: deque[EndedOwner] = deque(maxlen=most)
        self._open: dict[int, OpenOwner] = {}
        self._sockets = sockets
        # By identity, until they have their number.
        self._new: dict[int, CreationTuple] = {}
        self._recorder = make_recorder(self._new, {}, context, recording, id)
        self._record = self._recorder.on_create

    @property
    def on_make(self) -> Callable[[Any, object], None]:
        return self._record

    def on_made(self, owner: object, kind: OwnerKind) -> None:
        creation = self._new.pop(id(owner))
        numbered = (*creation[:SERIAL], self._sockets.mark(), *creation[SERIAL + 1 :])
        self._open[id(owner)] = OpenOwner(numbered, kind)

    def on_close(self, owner: object) -> None:
        self._open.pop(id(owner), None)

    def on_finalize(self, owner: object) -> None:
        entry = self._open.pop(id(owner), None)
        if entry is None or entry.kind.has_finalizer or entry.kind.is_closed(owner):
            return
        # The collector may have finalized some of its sockets just before it.
        dropped = {each.creation[OBJECT_ID]: each for each in self._sockets.dropped()}
        sockets, peers = [], []
        for sock in _sockets_in(owner, entry.kind):
            if _fileno(sock) >= 0:
                sockets.append(self._sockets.serial_at(_fileno(sock)))
                peers.append(ask_or_none(_socket.socket.getpeername, sock))
            elif (drop := dropped.get(id(sock))) is not None:
                sockets.append(drop.creation[SERIAL])
                peers.append(drop.snapshot.peer)
        if sockets:
            collected = entry.creation[SOCK]() is None
            self.ended.append(EndedOwner(*entry, collected, tuple(sockets), tuple(peers)))

    def on_error(self) -> None:
        self._sockets.on_error()

    def open_owners(self) -> list[tuple[object, OpenOwner]]:
        """Those that were not closed yet, as far as is known. The caller lets go of them soon."""
        found = []
        for key, entry in self._open.copy().items():
            owner = entry.creation[SOCK]()
            if owner is None:
                # A subclass has a finalizer of its own, which is asked for nothing here.
                self._open.pop(key, None)
            elif not _answer(entry.kind.is_closed, owner, otherwise=True):
                found.append((owner, entry))
        return found

    def owner_of(self, serial: int) -> Any:
        """The owner with a number, if it is still there."""
        for entry in self._open.copy().values():
            if entry.creation[SERIAL] == serial:
                return entry.creation[SOCK]()
        return None

    def after_fork(self) -> None:
        """In the child: those that have ended are the parent's."""
        self._recorder.pid = os.getpid()
        self.ended.clear()


def sockets_of(owner: object, kind: OwnerKind) -> Iterator[_socket.socket]:
    """The open sockets of an owner."""
    return (sock for sock in _sockets_in(owner, kind) if _fileno(sock) >= 0)


def _sockets_in(owner: object, kind: OwnerKind) -> Iterator[_socket.socket]:
    for connection in islice(kind.connections(owner), _MAX_CONNECTIONS):
        for layer in layers_of(connection):
            if is_a(layer, _socket.socket):
                yield layer
                break


def _answer(ask: Callable[[Any], Any], owner: object, otherwise: Any) -> Any:
    try:
        return ask(owner)
    except Exception:
        return otherwise
