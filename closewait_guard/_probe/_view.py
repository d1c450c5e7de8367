"""What every probe answers, and what they share in finding it."""

from __future__ import annotations

import _socket
import socket
from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple, Protocol

from closewait_guard._descriptor import inode_of
from closewait_guard._remains import Remains, asked, is_tls
from closewait_guard._vocabulary import Connection, Evidence, State

__all__ = [
    "INVALID",
    "Endpoint",
    "Poller",
    "Probe",
    "View",
    "endpoint_of",
    "endpoint_of_remains",
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


class View(NamedTuple):
    """What one look showed. Times are seconds ago."""

    state: State
    evidence: Evidence
    connection: Connection
    fin_for: float | None = None
    unread: int | None = None
    unsent: int | None = None
    last_sent_for: float | None = None
    last_received_for: float | None = None


class Poller(Protocol):
    """Remembers which descriptors it watches: to be given the same object again costs less."""

    def suspects(self, fds: Collection[int], /) -> dict[int, int]:
        """The descriptors on which something has happened, with the events."""


class Probe(Protocol):
    """One platform's way to ask."""

    def poller(self) -> Poller:
        """A new poller, for one thread at a time."""

    def look(self, sock: _socket.socket, fd: int, events: int, /) -> View | None:
        """Look at a socket; None if it is closed, or no longer owns the descriptor."""

    def read(self, remains: Remains, /) -> View:
        """What the last look at a socket showed."""


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
    """Describe a socket; what cannot be told is None."""
    return Endpoint(
        _family_name(_FAMILY(sock)),
        _kind_name(_TYPE(sock)),
        _address(asked(_socket.socket.getsockname, sock)),
        peer_of(sock),
        inode_of(fd),
        is_tls(sock),
    )


def endpoint_of_remains(remains: Remains) -> Endpoint:
    """Describe a socket that has died."""
    return Endpoint(
        _family_name(remains.family),
        _kind_name(remains.type),
        _address(remains.local),
        _address(remains.peer),
        remains.inode,
        remains.tls,
    )


def peer_of(sock: _socket.socket) -> str | None:
    """The address of the other end, if there is one."""
    return _address(asked(_socket.socket.getpeername, sock))


def _address(address: object) -> str | None:
    if isinstance(address, tuple) and len(address) >= 2:
        host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
        return f"{host}:{address[1]}"
    if isinstance(address, bytes):
        # The abstract namespace of Linux, which begins with a zero byte.
        return "@" + address[1:].decode(errors="backslashreplace")
    return str(address) if address else None
