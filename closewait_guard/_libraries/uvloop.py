"""uvloop, whose sockets libuv has opened or accepted, and rloop, which does so in Rust."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import HandleKind, HolderHint, Library, NativeCode
from closewait_guard._live import find_classes, is_exactly

__all__ = [
    "LIBRARIES",
]


_TRANSPORTS = (
    "uvloop.loop:TCPTransport",
    "uvloop.loop:UnixTransport",
    "uvloop.loop:UDPTransport",
)
_TLS = ("uvloop.loop:_SSLProtocolTransport",)


def _descriptors(transport: Any) -> Iterable[int]:
    # Its fields cannot be read, but code of the library's own answers.
    if is_exactly(transport, find_classes(_TRANSPORTS + _TLS).values()):
        sock = transport.get_extra_info("socket")
        if sock is not None:
            yield int(sock.fileno())


LIBRARIES = (
    Library(
        "uvloop",
        handles=(HandleKind(_TRANSPORTS, _descriptors),),
        inner=(HandleKind(_TLS, _descriptors),),
        attributed=(
            "uvloop:Loop.create_connection",
            "uvloop:Loop.create_unix_connection",
            "uvloop:Loop.create_server",
            "uvloop:Loop.create_unix_server",
            "uvloop:Loop.create_datagram_endpoint",
        ),
        hints=(
            HolderHint(
                "uvloop",
                "close the writer in a `finally` block: `writer.close()`, then `await "
                "writer.wait_closed()`; a bare transport needs transport.close()",
            ),
        ),
        native=(NativeCode("uvloop", "uvloop", "/uvloop/", "an event loop on libuv"),),
    ),
    Library(
        "rloop",
        native=(NativeCode("rloop", "rloop", "/rloop/", "an event loop in Rust"),),
    ),
)
