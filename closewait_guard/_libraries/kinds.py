"""How a library keeps its connections: what each file here says of its own.

The descriptor beneath what a library keeps: connections, streams, transports.

Which objects of a library have descriptors that no socket object is known for.
"""

from __future__ import annotations

import _socket
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from closewait_guard._live import call_native, field, find_classes, is_a, is_exactly, module_name

__all__ = [
    "UNBOUNDED",
    "OwnerKind",
    "PoolKind",
    "PoolUse",
    "descriptor_of",
    "nothing",
    "own_descriptor",
]


# What some libraries give as the bound of a pool that has none.
UNBOUNDED = 1_000_000


class PoolUse(NamedTuple):
    """What a pool has to do with one connection. Plain data: it keeps nothing alive.

    Attributes:
        library: The package.
        name: The pool, as its users would call it.
        is_idle: The connection waits in the pool, rather than being checked out.
        most: How many connections the pool keeps; None where it has no bound.
        pools: How many of the library's pools have idle connections to the same address.
        is_surplus: There are more of them than a program has reason to make.
    """

    library: str
    name: str
    is_idle: bool
    most: int | None
    pools: int = 1
    is_surplus: bool = False

    @property
    def owner(self) -> str:
        """What the table of hints knows it by."""
        return f"{self.library} for each call" if self.is_surplus else self.library

    @property
    def sentence(self) -> str:
        """Where the connection is."""
        where = "idle in" if self.is_idle else "checked out of"
        bound = f"at most {self.most:,}" if self.most is not None else "without a bound"
        beside = f", one of {self.pools:,} pools for this address" if self.pools > 1 else ""
        return f"{self.name}: {where} the pool ({bound}){beside}"


def nothing(_: Any) -> Iterable[object]:
    """For a kind whose pool does not know what is checked out of it, or what is idle."""
    return ()


@dataclass(frozen=True, slots=True)
class PoolKind:
    """One kind of pool. Each callable is given the pool, and may raise: then it is passed over.

    Attributes:
        library: The package.
        classes: The classes of the pool, as `module:name`; subclasses are found by themselves.
        name: What its users would call it.
        most: How many connections it keeps; None where there is no bound.
        idle: The connections that wait in it: what has a `fileno()`, or is a descriptor.
        busy: Those that are checked out.
    """

    library: str
    classes: tuple[str, ...]
    name: Callable[[Any], str]
    most: Callable[[Any], int | None]
    idle: Callable[[Any], Iterable[object]]
    busy: Callable[[Any], Iterable[object]] = nothing


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


@dataclass(frozen=True, slots=True)
class OwnerKind:
    """One kind of object that holds a native socket.

    Attributes:
        classes: Its classes, as `module:name`; subclasses are found by themselves.
        descriptors: Those that it has at this moment; may raise, then it is passed over.
    """

    classes: tuple[str, ...]
    descriptors: Callable[[Any], Iterable[int]]


def own_descriptor(owner: Any) -> Iterable[int]:
    """For what has one socket, or wraps something that has."""
    fd = descriptor_of(owner)
    return () if fd is None else (fd,)
