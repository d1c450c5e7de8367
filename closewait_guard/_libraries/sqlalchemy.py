"""SQLAlchemy: a queue of connection records; what is checked out is known by its borrower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._enums import Verdict
from closewait_guard._libraries.kinds import HolderHint, Library, PoolKind, for_each_call, nothing
from closewait_guard._live import elements_of, field, number_of, type_qualname

__all__ = [
    "LIBRARIES",
]


def _name(pool: Any) -> str:
    return f"SQLAlchemy {type_qualname(type(pool))}"


def _max_size(pool: Any) -> int | None:
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


def _checked_out(fairy: Any) -> Iterable[object]:
    return [field(fairy, "dbapi_connection")]


LIBRARIES = (
    Library(
        "sqlalchemy",
        pools=(
            PoolKind(("sqlalchemy.pool.impl:QueuePool",), _name, _max_size, _idle),
            PoolKind(
                ("sqlalchemy.pool.base:_ConnectionFairy",),
                lambda fairy: _name(field(fairy, "_pool")),
                lambda fairy: _max_size(field(fairy, "_pool")),
                nothing,
                _checked_out,
            ),
        ),
        hints=(
            HolderHint(
                "sqlalchemy.engine.base.Connection",
                "use `with engine.connect() as connection:`, or call connection.close(), which "
                "returns it to the pool",
            ),
            HolderHint(
                for_each_call("sqlalchemy"),
                "reuse one Engine, or call engine.dispose()",
            ),
            HolderHint(
                "sqlalchemy",
                "use create_engine(..., pool_pre_ping=True), or pool_recycle=... below the "
                "server's timeout: the next query on this connection would fail",
                (Verdict.STALE_POOL,),
            ),
        ),
    ),
)
