"""httpcore, and with it httpx: one pool that knows all its connections; and their successors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from closewait_guard._enums import Verdict
from closewait_guard._libraries.kinds import (
    NOT_GIVEN_BACK,
    UNBOUNDED,
    CheckoutKind,
    HolderHint,
    Library,
    OwnerKind,
    PoolKind,
    for_each_call,
    give_back,
    itself,
    read_response,
)
from closewait_guard._libraries.stdlib import loop_of
from closewait_guard._live import MISSING, elements_of, field, items_of, number_of, text_of

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


def _innermost(connection: Any) -> Any:
    """What speaks HTTP; None if it is not connected yet."""
    for _ in range(_MAX_DEPTH):
        connection = field(connection, "_connection")
        if field(connection, "_network_stream") is not None:
            return connection
    return None


def _state(connection: Any) -> str | None:
    return text_of(field(field(connection, "_state"), "_name_"))


def _connections(pool: Any, *, idle: bool) -> Iterable[object]:
    for inner in map(_innermost, elements_of(field(pool, "_connections"))):
        if inner is not None and (_state(inner) == "IDLE") is idle:
            yield field(inner, "_network_stream")


def _waiting(pool: Any) -> Iterable[object]:
    requests = elements_of(field(pool, "_requests"))
    return [each for each in requests if field(each, "connection", MISSING) is None]


def _most_out(pool: Any) -> int | None:
    """How many; None if there is no bound, or one connection serves many requests: HTTP/2."""
    size = number_of(field(pool, "_max_connections"))
    inner = map(_innermost, elements_of(field(pool, "_connections")))
    is_shared = any(field(each, "_h2_state") is not None for each in inner)
    return None if size is None or size >= UNBOUNDED or is_shared else size


def _pool_request(taken: Any) -> object:
    """What a pool has of a request until its response is closed; of that, or of its stream."""
    try:
        return taken.stream._pool_request
    except AttributeError:
        return taken._pool_request


def _connection_of(request: Any) -> Any:
    return _innermost(field(request, "connection"))


def _socket_of(request: Any) -> object:
    stream = field(_connection_of(request), "_network_stream")
    # That of an asynchronous one is further inside, and takes longer to find.
    return field(stream, "_sock", stream)


def _hosts(connections: Iterable[object]) -> Iterator[object]:
    """The names of the hosts that some connections are to, also by way of a proxy."""
    for connection in connections:
        origin = field(connection, "_origin")
        yield field(field(connection, "_remote_origin") if origin is None else origin, "host")


def _is_closed(client: Any) -> bool:
    return _state(client) == "CLOSED"


def _connections_of_client(client: Any) -> Iterable[object]:
    transports = [field(client, "_transport")]
    transports += [transport for _, transport in items_of(field(client, "_mounts"))]
    for transport in transports:
        yield from elements_of(field(field(transport, "_pool"), "_connections"))


def _one_client(httpx: str) -> str:
    return (
        f"reuse one client, or use `with {httpx}.Client() as client:` (`async with` for "
        "AsyncClient)"
    )


_STREAMED = (
    "use `with client.stream(...) as response:` (`async with` for AsyncClient), or call "
    "response.close() (`await response.aclose()`)"
)


def _client(httpx: str, httpcore: str) -> Library:
    return Library(
        httpx,
        owners=tuple(
            OwnerKind(
                f"{httpx}:{cls}",
                f"{httpx}.{cls}",
                _is_closed,
                _connections_of_client,
                loop=lambda client: loop_of(_connections_of_client(client)),
                purpose=lambda client: _hosts(_connections_of_client(client)),
            )
            for cls in ("Client", "AsyncClient")
        ),
        hints=(
            HolderHint(
                read_response(httpcore),
                f"close the client when you are done: `with {httpx}.Client() as client:` (`async "
                "with` for AsyncClient); the response was read, and its client keeps the idle "
                "connection",
            ),
            HolderHint(f"{httpx}.Response", _STREAMED, NOT_GIVEN_BACK),
            give_back(httpcore, _STREAMED),
            HolderHint(
                f"{httpx}.Client",
                f"reuse one Client, or use `with {httpx}.Client() as client:`",
            ),
            HolderHint(
                f"{httpx}.AsyncClient",
                f"reuse one AsyncClient, or use `async with {httpx}.AsyncClient() as client:`",
            ),
            # Its calls are named after the module that they are in.
            HolderHint(httpx, _one_client(httpx), (Verdict.DROPPED,)),
        ),
    )


def _pool(httpx: str, httpcore: str) -> Library:
    pools = (
        (f"{httpcore}._sync.connection_pool:ConnectionPool", "handle_request", "close"),
        (
            f"{httpcore}._async.connection_pool:AsyncConnectionPool",
            "handle_async_request",
            "aclose",
        ),
    )

    def name(_: Any) -> str:
        return f"{httpcore} pool of an {httpx} client"

    return Library(
        httpcore,
        pools=(
            PoolKind(
                tuple(cls for cls, *_ in pools),
                name,
                _max_size,
                lambda pool: _connections(pool, idle=True),
                lambda pool: _connections(pool, idle=False),
                _waiting,
                purpose=lambda pool: _hosts(elements_of(field(pool, "_connections"))),
            ),
        ),
        checkouts=tuple(
            CheckoutKind(
                httpcore,
                cls,
                name,
                _most_out,
                lambda request: _state(_connection_of(request)) == "ACTIVE",
                _socket_of,
                itself,
                takes=takes,
                gives_back=gives_back,
                taken_class=f"{cls.partition(':')[0]}:PoolByteStream",
                entry=_pool_request,
            )
            for cls, takes, gives_back in pools
        ),
        hints=(
            HolderHint(for_each_call(httpcore), _one_client(httpx)),
            HolderHint(httpcore, _one_client(httpx), (Verdict.OPEN,)),
            HolderHint(
                httpcore,
                "not a leak: the pool discards it on next use; for fewer of them, set "
                f"{httpx}.Limits(keepalive_expiry=...) below the server's keep-alive time",
                (Verdict.STALE_POOL,),
            ),
        ),
    )


# The second continues the first, under other names.
_PACKAGES = ("httpx", "httpcore"), ("httpx2", "httpcore2")

LIBRARIES = tuple(library(*names) for names in _PACKAGES for library in (_client, _pool))
