"""One line of the kernel's table of TCP connections, as raw as the kernel gives it."""

from __future__ import annotations

import socket
from functools import lru_cache
from typing import Any, NamedTuple

from closewait_guard._probe import View
from closewait_guard.model import Connection, Evidence, State

__all__ = ["CLOSE_WAIT", "LISTEN", "Entry", "Row", "view_of"]

CLOSE_WAIT, LISTEN = 8, 10


# The same as an Entry: of the many that are only counted, none is made.
Row = tuple[Any, ...]


class Entry(NamedTuple):
    """Numbers, ports and addresses in the order of the wire.

    Attributes:
        inode: 0 while no program has the socket: it waits to be accepted, or was closed.
        info: `struct tcp_info`, where it was asked for and given.
    """

    family: int
    state: int
    local_port: bytes
    peer_port: bytes
    local_host: bytes
    peer_host: bytes
    received: int
    sent: int
    uid: int
    inode: int
    info: bytes | None = None

    @property
    def local(self) -> str:
        """The address of this end."""
        return f"{_host(self.family, self.local_host)}:{int.from_bytes(self.local_port)}"

    @property
    def peer(self) -> str | None:
        """The address of the other end; None while there is none."""
        if self.state == LISTEN:
            return None
        return f"{_host(self.family, self.peer_host)}:{int.from_bytes(self.peer_port)}"

    @property
    def family_name(self) -> str:
        """As Python names it."""
        return "AF_INET6" if self.family == socket.AF_INET6 else "AF_INET"

    @property
    def unread(self) -> int:
        """Bytes that wait to be read: the kernel counts the FIN as one."""
        if self.state == LISTEN:
            return 0
        return self.received - (self.state == CLOSE_WAIT and self.received > 0)

    @property
    def unsent(self) -> int:
        """Bytes that the peer has not acknowledged."""
        return 0 if self.state == LISTEN else self.sent


@lru_cache(4096)
def _host(family: int, raw: bytes) -> str:
    if family == socket.AF_INET6:
        return f"[{socket.inet_ntop(socket.AF_INET6, raw)}]"
    return socket.inet_ntop(socket.AF_INET, raw[:4])


def view_of(entry: Entry) -> View:
    """The entry as a probe would have told it."""
    from closewait_guard._probe._linux import CONNECTIONS, STATES, tcp_view

    if entry.info is not None:
        return tcp_view(entry.info, lambda: entry.unread, lambda: entry.unsent)
    state = STATES[entry.state] if entry.state < len(STATES) else State.NONE
    return View(
        state,
        Evidence.TABLE,
        CONNECTIONS.get(state, Connection.LIVE),
        unread=entry.unread,
        unsent=entry.unsent,
    )
