"""httpcore, and with it httpx: one pool that knows all its connections."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard.integrations._pool import UNBOUNDED, PoolKind

__all__ = ["POOLS"]


def _most(pool: Any) -> int | None:
    most = min(pool._max_keepalive_connections, pool._max_connections)
    return None if most >= UNBOUNDED else int(most)


def _connections(pool: Any, *, idle: bool) -> Iterable[object]:
    for connection in list(pool._connections):
        inner = getattr(connection, "_connection", None)
        stream = getattr(inner, "_network_stream", None)
        if stream is not None and bool(connection.is_idle()) is idle:
            yield stream.get_extra_info("socket")


POOLS = (
    PoolKind(
        "httpcore",
        (
            "httpcore._sync.connection_pool:ConnectionPool",
            "httpcore._async.connection_pool:AsyncConnectionPool",
        ),
        lambda _: "httpcore pool of an httpx client",
        _most,
        lambda pool: _connections(pool, idle=True),
        lambda pool: _connections(pool, idle=False),
    ),
)
