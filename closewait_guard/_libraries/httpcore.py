"""httpcore, and with it httpx: one pool that knows all its connections."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import UNBOUNDED, PoolKind
from closewait_guard._live import elements_of, field, number_of, text_of

__all__ = [
    "POOLS",
]


# A connection to a proxy has one to the server inside, and that the one that speaks HTTP.
_DEEPEST = 3


def _most(pool: Any) -> int | None:
    names = ("_max_keepalive_connections", "_max_connections")
    bounds = (number_of(field(pool, name)) for name in names)
    most = min((bound for bound in bounds if bound is not None), default=UNBOUNDED)
    return None if most >= UNBOUNDED else most


def _connections(pool: Any, *, idle: bool) -> Iterable[object]:
    for connection in elements_of(field(pool, "_connections")):
        inner = connection
        for _ in range(_DEEPEST):
            inner = field(inner, "_connection")
            stream = field(inner, "_network_stream")
            if stream is not None:
                if (text_of(field(field(inner, "_state"), "_name_")) == "IDLE") is idle:
                    yield stream
                break


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
