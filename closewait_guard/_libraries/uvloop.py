"""uvloop: transports whose sockets libuv has opened or accepted."""

from __future__ import annotations

from closewait_guard._libraries.kinds import OwnerKind, own_descriptor

__all__ = [
    "ATTRIBUTED",
    "OWNERS",
]


OWNERS = (
    OwnerKind(
        ("uvloop.loop:TCPTransport", "uvloop.loop:UnixTransport", "uvloop.loop:UDPTransport"),
        own_descriptor,
    ),
)

ATTRIBUTED = {
    "uvloop": (
        "uvloop:Loop.create_connection",
        "uvloop:Loop.create_unix_connection",
        "uvloop:Loop.create_server",
        "uvloop:Loop.create_unix_server",
        "uvloop:Loop.create_datagram_endpoint",
    )
}
