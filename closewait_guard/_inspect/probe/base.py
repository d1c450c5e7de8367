"""What all probes have in common: their results, addresses, duplicated descriptors, the poller."""

from __future__ import annotations

import _socket
import errno
import os
import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

from closewait_guard._clock import select
from closewait_guard._descriptors import OwnedDescriptor, ask_or_none, inode_of
from closewait_guard._enums import Connection, Evidence, State
from closewait_guard._live import is_tls

__all__ = [
    "INVALID",
    "Endpoint",
    "PollPoller",
    "Poller",
    "Probe",
    "ProbeResult",
    "address_text",
    "duplicate_fd",
    "endpoint_of",
    "endpoint_of_snapshot",
    "has_moved_no_data",
    "has_sent",
    "peer_of",
    "select",
]


# Among a poller's events: the number is that of no open descriptor. As poll has it.
INVALID = 0x020


class Endpoint(NamedTuple):
    """What does not change while a connection lasts, nor after its end."""

    family: str
    type: str
    local: str | None
    peer: str | None
    inode: int | None = None
    tls: bool = False


class ProbeResult(NamedTuple):
    """What one probe showed. Times are seconds ago.

    Attributes:
        fin_for: When the peer closed.
        is_fin_bound: It may have closed earlier: what is dated may be an answer to a keepalive.
    """

    state: State
    evidence: Evidence
    connection: Connection
    fin_for: float | None = None
    unread: int | None = None
    unsent: int | None = None
    last_sent_for: float | None = None
    last_received_for: float | None = None
    is_fin_bound: bool = False


class Poller(Protocol):
    """Remembers which descriptors it watches: to be given the same object again costs less."""

    def suspects(self, fds: Collection[int], /) -> dict[int, int]:
        """The descriptors on which something has happened, with the events."""


class Probe(Protocol):
    """One platform's way to ask."""

    def poller(self) -> Poller:
        """A new poller, for one thread at a time."""

    def probe_socket(
        self, sock: _socket.socket, fd: int, events: int, before: ProbeResult | None = None, /
    ) -> ProbeResult | None:
        """Probe a socket; None if it is closed, or no longer owns the descriptor.

        Args:
            sock: The socket.
            fd: Its descriptor.
            events: What a poll has shown of it.
            before: What the probe before has shown: what cannot change since is not asked again.
        """

    def probe_snapshot(self, snapshot: FinalSnapshot, /) -> ProbeResult:
        """What the snapshot of a dropped socket shows."""

    def has_unsent(self, sock: _socket.socket, /) -> bool:
        """Whether it has anything that is not acknowledged, where the platform dates answers."""

    def unanswered(self, sock: _socket.socket, /) -> Unanswered | None:
        """What a peer does not acknowledge, though it was sent again."""


# Past the properties of Python's class, which make an enum of each number.
_FAMILY = vars(_socket.socket)["family"].__get__
_TYPE = vars(_socket.socket)["type"].__get__


@lru_cache(64)
def _family_name(number: int) -> str:
    """`AF_INET` for 2; the number itself for one that Python does not know."""
    try:
        return socket.AddressFamily(number).name
    except ValueError:
        return f"AF_{number}"


@lru_cache(64)
def _kind_name(number: int) -> str:
    """`SOCK_STREAM` for 1."""
    try:
        return socket.SocketKind(number).name
    except ValueError:
        return f"SOCK_{number}"


def endpoint_of(sock: _socket.socket, fd: int) -> Endpoint:
    """Describe a socket; what is not known is None."""
    return Endpoint(
        _family_name(_FAMILY(sock)),
        _kind_name(_TYPE(sock)),
        address_text(ask_or_none(_socket.socket.getsockname, sock)),
        peer_of(sock),
        inode_of(fd),
        is_tls(sock),
    )


def endpoint_of_snapshot(snapshot: FinalSnapshot) -> Endpoint:
    """Describe a socket that was dropped."""
    return Endpoint(
        _family_name(snapshot.family),
        _kind_name(snapshot.type),
        address_text(snapshot.local),
        address_text(snapshot.peer),
        snapshot.inode,
        snapshot.tls,
    )


def peer_of(sock: _socket.socket) -> str | None:
    """The address of the other end, if there is one."""
    return address_text(ask_or_none(_socket.socket.getpeername, sock))


def address_text(address: object) -> str | None:
    """An address as the kernel gives it, in the form in which reports show it."""
    if isinstance(address, tuple) and len(address) >= 2:
        host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
        return f"{host}:{address[1]}"
    if isinstance(address, bytes):
        # The abstract namespace of Linux, which begins with a zero byte.
        return "@" + address[1:].decode(errors="backslashreplace")
    return str(address) if address else None


@contextmanager
def duplicate_fd(fd: int) -> Iterator[_socket.socket]:
    """A socket object on a copy of a descriptor; the copy is closed afterwards.

    Where there is no room for a copy, the object is on the descriptor itself.

    Raises:
        OSError: The descriptor is closed, or is not a socket.
    """
    with _on_copy(fd, socket.SOCK_STREAM) as sock:
        kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        if kind == socket.SOCK_STREAM:
            yield sock
            return
    with _on_copy(fd, kind) as sock:
        yield sock


@contextmanager
def _on_copy(fd: int, kind: int) -> Iterator[_socket.socket]:
    # With a default timeout set, the constructor would make the shared description non-blocking,
    # unless it is given that it already is.
    flag = getattr(socket, "SOCK_NONBLOCK", 0)
    copy = _copy_of(fd)
    try:
        # No keyword: Python 3.12 keeps the names of a C function's arguments for the whole process
        # where they are first used, and aborts at its end if that was an isolated interpreter.
        sock = _socket.socket(-1, kind | flag, -1, fd if copy is None else copy.fileno())
        try:
            yield sock
        finally:
            # The object would close whatever has its number by now.
            sock.detach()
    finally:
        if copy is not None:
            copy.close()


def _copy_of(fd: int) -> OwnedDescriptor | None:
    try:
        return OwnedDescriptor(os.dup(fd))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return None


if TYPE_CHECKING:
    from closewait_guard._capture import FinalSnapshot
    from closewait_guard.model import Unanswered


class PollPoller:
    """Asks for some events, and for hang-ups and errors, which come unasked."""

    def __init__(self, events: int) -> None:
        self._poll = select.poll()
        self._events = events
        self._given: object = None
        self._watched: set[int] = set()

    def suspects(self, fds: Collection[int]) -> dict[int, int]:
        if fds is not self._given:
            wanted = set(fds)
            for fd in self._watched - wanted:
                self._poll.unregister(fd)
            for fd in wanted - self._watched:
                self._poll.register(fd, self._events)
            self._given, self._watched = fds, wanted
        return dict(self._poll.poll(0))


# The bytes that were received and the segments with data that were sent, in `struct tcp_info`.
_TRAFFIC = struct.Struct("=128x Q 20x I")


def has_sent(info: bytes) -> bool:
    """Whether an end is known to have sent anything, by its `struct tcp_info`."""
    return len(info) >= _TRAFFIC.size and bool(_TRAFFIC.unpack_from(info)[1])


def has_moved_no_data(before: bytes, after: bytes, unread: int) -> bool:
    """Whether an end has sent and read nothing between two times, by its `struct tcp_info`."""
    if min(len(before), len(after)) < _TRAFFIC.size:
        return False
    (received, sent), (received_since, sent_since) = map(_TRAFFIC.unpack_from, (before, after))
    return bool(sent == sent_since and received_since - received <= unread)
