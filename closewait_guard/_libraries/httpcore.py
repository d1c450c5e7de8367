"""httpcore, and with it httpx: one pool that knows all its connections."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._enums import Verdict
from closewait_guard._libraries.kinds import (
    UNBOUNDED,
    HolderHint,
    Library,
    OwnerKind,
    PoolKind,
    for_each_call,
    read_response,
)
from closewait_guard._live import elements_of, field, items_of, number_of, text_of

__all__ = [
    "LIBRARIES",
]


# A connection to a proxy has one to the server inside, and that the one that speaks HTTP.
_MAX_DEPTH = 3


def _max_size(pool: Any) -> int | None:
    names = ("_max_keepalive_connections", "_max_connections")
    bounds = (number_of(field(pool, name)) for name in names)
    size = min((bound for bound in bounds if bound is not None), default=UNBOUNDED)
    return None if size >= UNBOUNDED else size


def _connections(pool: Any, *, idle: bool) -> Iterable[object]:
    for connection in elements_of(field(pool, "_connections")):
        inner = connection
        for _ in range(_MAX_DEPTH):
            inner = field(inner, "_connection")
            stream = field(inner, "_network_stream")
            if stream is not None:
                if (text_of(field(field(inner, "_state"), "_name_")) == "IDLE") is idle:
                    yield stream
                break


def _is_closed(client: Any) -> bool:
    return text_of(field(field(client, "_state"), "_name_")) == "CLOSED"


def _connections_of_client(client: Any) -> Iterable[object]:
    transports = [field(client, "_transport")]
    transports += [transport for _, transport in items_of(field(client, "_mounts"))]
    for transport in transports:
        yield from elements_of(field(field(transport, "_pool"), "_connections"))


_ONE_CLIENT = (
    "reuse one client, or use `with httpx.Client() as client:` (`async with` for AsyncClient)"
)

LIBRARIES = (
    Library(
        "httpx",
        owners=tuple(
            OwnerKind(f"httpx:{name}", f"httpx.{name}", _is_closed, _connections_of_client)
            for name in ("Client", "AsyncClient")
        ),
        hints=(
            HolderHint(
                read_response("httpcore"),
                "close the client when you are done: `with httpx.Client() as client:` (`async "
                "with` for AsyncClient); the response was read, and its client keeps the idle "
                "connection",
            ),
            HolderHint(
                "httpx.Response",
                "use `with client.stream(...) as response:` (`async with` for AsyncClient), or "
                "call response.close() (`await response.aclose()`)",
            ),
            HolderHint(
                "httpx.Client",
                "reuse one Client, or use `with httpx.Client() as client:`",
            ),
            HolderHint(
                "httpx.AsyncClient",
                "reuse one AsyncClient, or use `async with httpx.AsyncClient() as client:`",
            ),
            # Its calls are named after the module that they are in.
            HolderHint("httpx", _ONE_CLIENT, (Verdict.DROPPED,)),
        ),
    ),
    Library(
        "httpcore",
        pools=(
            PoolKind(
                (
                    "httpcore._sync.connection_pool:ConnectionPool",
                    "httpcore._async.connection_pool:AsyncConnectionPool",
                ),
                lambda _: "httpcore pool of an httpx client",
                _max_size,
                lambda pool: _connections(pool, idle=True),
                lambda pool: _connections(pool, idle=False),
            ),
        ),
        hints=(
            HolderHint(for_each_call("httpcore"), _ONE_CLIENT),
            HolderHint("httpcore", _ONE_CLIENT, (Verdict.OPEN,)),
            HolderHint(
                "httpcore",
                "not a leak: the pool discards it on next use; for fewer of them, set "
                "httpx.Limits(keepalive_expiry=...) below the server's keep-alive time",
                (Verdict.STALE_POOL,),
            ),
        ),
    ),
)
