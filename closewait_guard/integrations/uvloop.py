"""uvloop: transports whose sockets libuv has opened or accepted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard.integrations._owner import OwnerKind

__all__ = ["ATTRIBUTED", "OWNERS"]


def _descriptors(transport: Any) -> Iterable[int]:
    return [transport.get_extra_info("socket").fileno()]


OWNERS = (
    OwnerKind(
        ("uvloop.loop:TCPTransport", "uvloop.loop:UnixTransport", "uvloop.loop:UDPTransport"),
        _descriptors,
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
