"""The descriptor beneath what a library keeps: connections, streams, transports."""

from __future__ import annotations

import _socket
from collections import deque
from typing import Any

from closewait_guard._objects import (
    call_native,
    field,
    find_classes,
    is_a,
    is_exactly,
    module_name,
)

__all__ = ["descriptor_of"]

# Where libraries store what they wrap, from the outermost to the socket.
_WRAPPED = (
    "_sock",
    "sock",
    "socket",
    "_raw_socket",
    "_writer",
    "_transport",
    "transport",
    "_ssl_protocol",
    "_stream",
    "transport_stream",
    "_network_stream",
    "dbapi_connection",
    "_connection",
    "pgconn",
)
_MOST = 40

# What stores nothing that could be read, but answers by code of the library's own.
_UVLOOP = (
    "uvloop.loop:TCPTransport",
    "uvloop.loop:UnixTransport",
    "uvloop.loop:UDPTransport",
    "uvloop.loop:_SSLProtocolTransport",
)
_LIBPQ = ("psycopg_binary.pq:PGconn", "psycopg_c.pq:PGconn", "psycopg.pq.pq_ctypes:PGconn")


def descriptor_of(thing: Any) -> int | None:
    """That of a socket, or of the socket beneath a connection; None where there is none."""
    if type(thing) is int:
        return thing
    waiting = deque([thing])
    for _ in range(_MOST):
        if not waiting:
            break
        inner = waiting.popleft()
        fd = _own_descriptor(inner)
        if fd is not None:
            return fd
        further = (field(inner, name) for name in _WRAPPED)
        waiting += [each for each in further if each is not None]
    return None


def _own_descriptor(thing: Any) -> int | None:
    if is_a(thing, _socket.socket):
        return _socket.socket.fileno(thing)
    package = (module_name(type(thing)) or "").partition(".")[0]
    if package == "uvloop" and is_exactly(thing, find_classes(_UVLOOP).values()):
        sock = thing.get_extra_info("socket")
        return None if sock is None else int(sock.fileno())
    if package.startswith("psycopg") and is_exactly(thing, find_classes(_LIBPQ).values()):
        return int(thing.socket)
    for cls in find_classes(["psycopg2.extensions:connection"]).values():
        if is_a(thing, cls):
            return int(call_native(thing, cls, "fileno"))
    return None
