"""redis-py: a pool with a list of idle connections and a set of those in use, sync and async."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import UNBOUNDED, PoolKind
from closewait_guard._live import elements_of, field, number_of, text_of, value_at

__all__ = [
    "POOLS",
]


def _name(pool: Any) -> str:
    to = field(pool, "connection_kwargs")
    to = field(pool, "_connection_kwargs") if to is None else to
    path, host = text_of(value_at(to, "path")), text_of(value_at(to, "host"))
    port = number_of(value_at(to, "port"))
    return f"redis pool of {path or host or 'localhost'}:{6379 if port is None else port}"


def _most(pool: Any) -> int | None:
    most = number_of(field(pool, "max_connections"))
    return None if most is None or most >= UNBOUNDED else most


def _idle(pool: Any) -> Iterable[object]:
    waiting = field(pool, "pool")
    idle = field(pool, "_available_connections") if waiting is None else field(waiting, "queue")
    return elements_of(idle)


def _busy(pool: Any) -> Iterable[object]:
    return elements_of(field(pool, "_in_use_connections"))


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
