"""redis-py: a pool with a list of idle connections and a set of those in use, sync and async."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._enums import Verdict
from closewait_guard._libraries.kinds import (
    UNBOUNDED,
    CheckoutKind,
    HolderHint,
    Library,
    OwnerKind,
    PoolKind,
    always,
    for_each_call,
    give_back,
    itself,
    never,
    waiting_for,
)
from closewait_guard._libraries.stdlib import loop_of
from closewait_guard._live import elements_of, field, number_of, text_of, value_at

__all__ = [
    "LIBRARIES",
]


def _settings(pool: Any) -> object:
    to = field(pool, "connection_kwargs")
    return field(pool, "_connection_kwargs") if to is None else to


def _name(pool: Any) -> str:
    to = _settings(pool)
    path, host = text_of(value_at(to, "path")), text_of(value_at(to, "host"))
    port = number_of(value_at(to, "port"))
    return f"redis pool of {path or host or 'localhost'}:{6379 if port is None else port}"


def _max_size(pool: Any) -> int | None:
    size = number_of(field(pool, "max_connections"))
    return None if size is None or size >= UNBOUNDED else size


def _idle(pool: Any) -> Iterable[object]:
    waiting = field(pool, "pool")
    idle = field(pool, "_available_connections") if waiting is None else field(waiting, "queue")
    return elements_of(idle)


def _waiting(pool: Any) -> Iterable[object]:
    # Of a blocking pool: in a queue, or at a condition if it is asynchronous.
    at_condition = elements_of(field(field(pool, "_condition"), "_waiters"))
    return at_condition or waiting_for(field(pool, "pool"))


def _purpose(pool: Any) -> Iterable[object]:
    return [value_at(_settings(pool), name) for name in ("db", "username")]


def _checked_out(pool: Any) -> Iterable[object]:
    return elements_of(field(pool, "_in_use_connections"))


# What a command, a subscription or a monitor takes it gives back: it may wait for any time.
_MAY_LAST = ("Redis.execute_command", "Redis._execute_command", "PubSub.", "Monitor.")
_POOLS = (
    "redis.connection:ConnectionPool",
    "redis.connection:BlockingConnectionPool",
    "redis.asyncio.connection:ConnectionPool",
    "redis.asyncio.connection:BlockingConnectionPool",
)


def _is_closed(client: Any) -> bool:
    # A pool that was given to it is closed by what has made that.
    return field(client, "auto_close_connection_pool") is False


def _connections_of_pool(pool: Any) -> Iterable[object]:
    return [*_idle(pool), *_checked_out(pool)]


def _connections(client: Any) -> Iterable[object]:
    return _connections_of_pool(field(client, "connection_pool"))


def _purpose_of_client(client: Any) -> Iterable[object]:
    return _purpose(field(client, "connection_pool"))


_ONE_CLIENT = (
    "reuse one client, which has a connection pool, or call client.close() (`await "
    "client.aclose()`)"
)
LIBRARIES = (
    Library(
        "redis",
        pools=(
            PoolKind(
                ("redis.connection:ConnectionPool", "redis.asyncio.connection:ConnectionPool"),
                _name,
                _max_size,
                _idle,
                _checked_out,
                _waiting,
                purpose=_purpose,
            ),
        ),
        checkouts=tuple(
            CheckoutKind(
                "redis",
                name,
                _name,
                _max_size,
                always,
                itself,
                itself,
                takes="get_connection",
                gives_back="release",
                may_last=_MAY_LAST,
            )
            for name in _POOLS
        ),
        owners=(
            OwnerKind(
                "redis.asyncio.client:Redis",
                "redis.asyncio.Redis",
                _is_closed,
                _connections,
                loop=lambda client: loop_of(_connections(client)),
                purpose=_purpose_of_client,
            ),
            # Such a client closes its own pool when it is collected.
            OwnerKind(
                "redis.client:Redis",
                "redis.Redis",
                _is_closed,
                _connections,
                closes_itself=True,
                purpose=_purpose_of_client,
            ),
            *(
                OwnerKind(
                    f"{part}.connection:ConnectionPool",
                    f"{part}.ConnectionPool",
                    never,
                    _connections_of_pool,
                    loop=lambda pool: loop_of(_connections_of_pool(pool)),
                    part_of=(f"{part}.client",),
                    purpose=_purpose,
                )
                for part in ("redis", "redis.asyncio")
            ),
        ),
        hints=(
            HolderHint(
                "redis.connection.ConnectionPool",
                "reuse one pool, and call pool.disconnect() when you are done: no client closes a "
                "pool that was given to it",
                (Verdict.UNCLOSED, Verdict.SURPLUS),
            ),
            HolderHint(
                "redis.asyncio.connection.ConnectionPool",
                "reuse one pool, and `await pool.disconnect()` when you are done: no client closes "
                "a pool that was given to it",
                (Verdict.UNCLOSED, Verdict.SURPLUS),
            ),
            HolderHint(
                for_each_call("redis"),
                f"{_ONE_CLIENT}; a pool that was given to the client is closed by "
                "pool.disconnect()",
            ),
            HolderHint("redis.client.Redis", _ONE_CLIENT, (Verdict.SURPLUS,)),
            HolderHint("redis.asyncio.client.Redis", _ONE_CLIENT, (Verdict.SURPLUS,)),
            HolderHint(
                "redis",
                "return the connection: call client.close() (`await client.aclose()`), or use "
                "`with redis.Redis(...) as client:`; a pubsub needs its own close(), a pipeline "
                "reset()",
            ),
            give_back(
                "redis",
                "call pool.release(connection) in a `finally` block; a pubsub needs "
                "its own close(), a pipeline reset(), a client with single_connection_client "
                "close()",
                (Verdict.CHECKED_OUT,),
            ),
            HolderHint(
                "redis",
                "not a leak: the pool discards it on next use; a pool that was given to its client "
                "is closed by pool.disconnect(), not by client.close(); health_check_interval=... "
                "finds it earlier, and the server's `timeout` sets how long it keeps idle clients",
                (Verdict.STALE_POOL,),
            ),
        ),
    ),
)
