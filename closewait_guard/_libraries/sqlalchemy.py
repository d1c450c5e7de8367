"""SQLAlchemy: a queue of connection records; what is checked out is known by its borrower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import PoolKind, nothing
from closewait_guard._live import elements_of, field, number_of, type_qualname

__all__ = [
    "POOLS",
]


def _name(pool: Any) -> str:
    return f"SQLAlchemy {type_qualname(type(pool))}"


def _most(pool: Any) -> int | None:
    overflow = number_of(field(pool, "_max_overflow"))
    size = number_of(field(field(pool, "_pool"), "maxsize"))
    return None if overflow is None or size is None or overflow < 0 else size + overflow


def _idle(pool: Any) -> Iterable[object]:
    queue = field(pool, "_pool")
    records = field(queue, "queue")
    if records is None:
        # That of an asynchronous engine: around a queue of asyncio, which is around a deque.
        records = field(field(queue, "_queue"), "_queue")
    return [field(record, "dbapi_connection") for record in elements_of(records)]


def _busy(fairy: Any) -> Iterable[object]:
    return [field(fairy, "dbapi_connection")]


POOLS = (
    PoolKind("sqlalchemy", ("sqlalchemy.pool.impl:QueuePool",), _name, _most, _idle),
    PoolKind(
        "sqlalchemy",
        ("sqlalchemy.pool.base:_ConnectionFairy",),
        lambda fairy: _name(field(fairy, "_pool")),
        lambda fairy: _most(field(fairy, "_pool")),
        nothing,
        _busy,
    ),
)
