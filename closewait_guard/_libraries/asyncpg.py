"""asyncpg: connections on transports of asyncio, alone or in a pool."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import (
    CheckoutKind,
    HolderHint,
    Library,
    OwnerKind,
    give_back,
    waiting_for,
)
from closewait_guard._live import MISSING, elements_of, field, number_of

__all__ = [
    "LIBRARIES",
]


def _transport(connection: Any) -> Iterable[object]:
    return [field(connection, "_transport")]


def _max_size(pool: Any) -> int | None:
    return number_of(field(pool, "_maxsize"))


def _proxy(connection: Any) -> object:
    """What the program has while it has the connection: no weak reference to it can be made."""
    return field(connection, "_proxy")


def _pool_of(connection: Any) -> object:
    return field(field(_proxy(connection), "_holder"), "_pool")


LIBRARIES = (
    Library(
        "asyncpg",
        owners=(
            # Its pools allow no weak references; their connections stand for them.
            OwnerKind(
                "asyncpg.connection:Connection",
                "asyncpg.Connection",
                lambda connection: field(connection, "_aborted") is not False,
                _transport,
                loop=lambda connection: field(connection, "_loop"),
                # Those of a pool are as many as that wants.
                is_idle=lambda connection: field(connection, "_pool_holder", MISSING) is None,
                part_of=("sqlalchemy",),
                # User and database.
                purpose=lambda connection: elements_of(field(connection, "_params"))[:3:2],
            ),
        ),
        checkouts=(
            CheckoutKind(
                "asyncpg",
                "asyncpg.pool:Pool",
                lambda _: "asyncpg pool",
                _max_size,
                lambda connection: _proxy(connection) is not None,
                lambda connection: field(connection, "_transport"),
                _proxy,
                takes="_acquire",
                gives_back="release",
                entry=lambda proxy: proxy._con,
                pool_of=_pool_of,
                waiting=lambda pool: waiting_for(field(pool, "_queue")),
            ),
        ),
        hints=(
            give_back(
                "asyncpg",
                "use `async with pool.acquire() as connection:`, or call `await "
                "pool.release(connection)` in a `finally` block",
            ),
            HolderHint(
                "asyncpg",
                "call `await connection.close()` in a `finally` block; for a pool, use `async with "
                "asyncpg.create_pool(...) as pool:`, or call `await pool.close()`",
            ),
        ),
    ),
)
