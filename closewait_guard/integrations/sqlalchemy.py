"""SQLAlchemy: a queue of connection records; what is checked out is known by its borrower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard.integrations._pool import PoolKind, nothing

__all__ = ["POOLS"]


def _name(pool: Any) -> str:
    return f"SQLAlchemy {type(pool).__name__}"


def _most(pool: Any) -> int | None:
    return None if pool._max_overflow < 0 else int(pool.size()) + int(pool._max_overflow)


def _idle(pool: Any) -> Iterable[object]:
    queue = pool._pool
    records: Any = getattr(queue, "queue", None) or getattr(queue, "_queue", ())
    return [record.dbapi_connection for record in list(records)]


def _busy(fairy: Any) -> Iterable[object]:
    return [fairy.dbapi_connection]


POOLS = (
    PoolKind("sqlalchemy", ("sqlalchemy.pool.impl:QueuePool",), _name, _most, _idle),
    PoolKind(
        "sqlalchemy",
        ("sqlalchemy.pool.base:_ConnectionFairy",),
        lambda fairy: _name(fairy._pool),
        lambda fairy: _most(fairy._pool),
        nothing,
        _busy,
    ),
)
