"""SQLAlchemy: a queue of connection records; what is checked out is known by its borrower."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from closewait_guard._enums import Verdict
from closewait_guard._libraries.kinds import (
    CheckoutKind,
    HolderHint,
    Library,
    OwnerKind,
    PoolKind,
    for_each_call,
    give_back,
    never,
    nothing,
    waiting_for,
)
from closewait_guard._libraries.psycopg import databases_of, libpq_descriptor
from closewait_guard._libraries.stdlib import loop_of
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


def _idle(pool: Any) -> list[object]:
    queue = field(pool, "_pool")
    records = field(queue, "queue")
    if records is None:
        # That of an asynchronous engine: around a queue of asyncio, which is around a deque.
        records = field(field(queue, "_queue"), "_queue")
    return [field(record, "dbapi_connection") for record in elements_of(records)]


def _purpose(pool: Any) -> Iterable[object]:
    return databases_of(_idle(pool))


def _purpose_of_engine(engine: Any) -> Iterable[object]:
    # User, host and database, for drivers whose connections do not show them.
    url = elements_of(field(engine, "url"))
    return [*_purpose(field(engine, "pool")), *url[1:2], *url[3:4], *url[5:6]]


def _waiting(pool: Any) -> Iterable[object]:
    queue = field(pool, "_pool")
    inner = field(queue, "_queue")
    return waiting_for(queue if inner is None else inner)


def _connections(engine: Any) -> Iterator[object]:
    for connection in _idle(field(engine, "pool")):
        fd = libpq_descriptor(connection)
        yield connection if fd is None else fd


def _checked_out(fairy: Any) -> Iterable[object]:
    return [field(fairy, "dbapi_connection")]


def _is_out(record: Any) -> bool:
    return record.fairy_ref is not None and _borrowed(record) is not None


def _connection(record: Any) -> object:
    return record.dbapi_connection


def _borrowed(record: Any) -> object:
    """What the program has while it has the connection."""
    return record.fairy_ref()


def _listen(
    pool_class: type, take: Callable[[Any, Any], None], give_back: Callable[[Any], None]
) -> Callable[[], None]:
    """By the events of its pools: those of the class are those of all pools, also of earlier ones.

    What was handed out is known by its record in the pool, of which there is one for each
    connection.
    """
    event = sys.modules["sqlalchemy.event"]

    def on_checkout(_: object, record: Any, fairy: Any) -> None:
        try:
            # No public name has it, and `field` would take ten times as long as all the rest.
            pool = fairy._pool
        except AttributeError:
            return
        take(pool, record)

    def on_end(_: object, record: Any) -> None:
        give_back(record)

    listeners = {"checkout": on_checkout, "checkin": on_end, "detach": on_end}
    for name, listener in listeners.items():
        event.listen(pool_class, name, listener)

    def stop() -> None:
        for name, listener in listeners.items():
            event.remove(pool_class, name, listener)

    return stop


LIBRARIES = (
    Library(
        "sqlalchemy",
        checkouts=(
            CheckoutKind(
                "sqlalchemy",
                "sqlalchemy:Pool",
                _name,
                _max_size,
                _is_out,
                _connection,
                _borrowed,
                _listen,
            ),
        ),
        pools=(
            PoolKind(
                ("sqlalchemy.pool.impl:QueuePool",),
                _name,
                _max_size,
                _idle,
                waiting=_waiting,
                purpose=_purpose,
            ),
            PoolKind(
                ("sqlalchemy.pool.base:_ConnectionFairy",),
                lambda fairy: _name(field(fairy, "_pool")),
                lambda fairy: _max_size(field(fairy, "_pool")),
                nothing,
                _checked_out,
            ),
        ),
        owners=(
            OwnerKind(
                "sqlalchemy.engine.base:Engine",
                "sqlalchemy.Engine",
                never,
                _connections,
                loop=lambda engine: loop_of(_idle(field(engine, "pool"))),
                purpose=_purpose_of_engine,
            ),
        ),
        hints=(
            give_back(
                "sqlalchemy",
                "`with Session() as session:` or `with engine.connect() as "
                "connection:` (`async with` for asynchronous ones), or close() in a `finally` "
                "block",
            ),
            HolderHint(
                "sqlalchemy.engine.base.Engine",
                "use one Engine for all calls, or call engine.dispose() when you are done (`await "
                "engine.dispose()` for AsyncEngine)",
            ),
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
