"""redis-py: a pool with a list of idle connections and a set of those in use, sync and async."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard.integrations._pool import UNBOUNDED, PoolKind

__all__ = ["POOLS"]


def _name(pool: Any) -> str:
    to = pool.connection_kwargs
    return f"redis pool of {to.get('path') or to.get('host', 'localhost')}:{to.get('port', 6379)}"


def _most(pool: Any) -> int | None:
    return None if pool.max_connections >= UNBOUNDED else int(pool.max_connections)


def _socket(connection: Any) -> object:
    writer = getattr(connection, "_writer", None)
    return connection._sock if writer is None else writer.get_extra_info("socket")


def _idle(pool: Any) -> Iterable[object]:
    waiting = getattr(pool, "pool", None)
    idle = pool._available_connections if waiting is None else waiting.queue
    return [_socket(connection) for connection in list(idle) if connection is not None]


def _busy(pool: Any) -> Iterable[object]:
    return [_socket(connection) for connection in list(pool._in_use_connections)]


POOLS = (
    PoolKind(
        "redis",
        ("redis.connection:ConnectionPool", "redis.asyncio.connection:ConnectionPool"),
        _name,
        _most,
        _idle,
        _busy,
    ),
)
