"""What every probe answers, and what they share in finding it."""

from __future__ import annotations

import _socket
import socket
from collections.abc import Set
from functools import lru_cache
from typing import NamedTuple, Protocol

from closewait_guard.model import Connection, Evidence, State

__all__ = [
    "Poller",
    "Probe",
    "View",
    "family_name",
    "is_listening",
    "kind_name",
    "local_address",
    "peer_address",
]


class View(NamedTuple):
    """What one look showed. Times are seconds ago."""

    family: str
    type: str
    local: str | None
    peer: str | None
    state: State
    evidence: Evidence
    connection: Connection
    fin_for: float | None = None
    unread: int | None = None
    unsent: int | None = None
    last_sent_for: float | None = None
    last_received_for: float | None = None


class Poller(Protocol):
    """Remembers which descriptors it watches, so that a second look costs less."""

    def suspects(self, fds: Set[int], /) -> dict[int, int]:
        """The descriptors on which something has happened, with the events."""


class Probe(Protocol):
    """One platform's way to ask."""

    def poller(self) -> Poller:
        """A new poller, for one thread at a time."""

    def look(self, sock: _socket.socket, fd: int, events: int, /) -> View | None:
        """Describe a socket; None if it is closed, or no longer owns the descriptor."""


_getsockname = _socket.socket.getsockname
_getpeername = _socket.socket.getpeername
_getsockopt = _socket.socket.getsockopt


@lru_cache(64)
def family_name(number: int) -> str:
    """`AF_INET` for 2; the number itself for one that Python does not know."""
    try:
        return socket.AddressFamily(number).name
    except ValueError:
        return f"AF_{number}"


@lru_cache(64)
def kind_name(number: int) -> str:
    """`SOCK_STREAM` for 1."""
    try:
        return socket.SocketKind(number).name
    except ValueError:
        return f"SOCK_{number}"


def local_address(sock: _socket.socket) -> str | None:
    """Our end as text, None where there is none."""
    try:
        return _address(_getsockname(sock))
    except OSError:
        return None


def peer_address(sock: _socket.socket) -> str | None:
    """The other end as text, None where there is none."""
    try:
        return _address(_getpeername(sock))
    except OSError:
        return None


def is_listening(sock: _socket.socket) -> bool:
    """Whether the socket waits for connections."""
    try:
        return bool(_getsockopt(sock, socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


def _address(address: object) -> str | None:
    if isinstance(address, tuple) and len(address) >= 2:
        host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
        return f"{host}:{address[1]}"
    if isinstance(address, bytes):
        # The abstract namespace of Linux, which begins with a zero byte.
        return "@" + address[1:].decode(errors="backslashreplace")
    return str(address) if address else None
