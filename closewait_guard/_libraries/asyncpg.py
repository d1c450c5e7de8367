"""asyncpg: connections on transports of asyncio, alone or in a pool."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import HolderHint, Library, OwnerKind
from closewait_guard._live import MISSING, field

__all__ = [
    "LIBRARIES",
]


def _transport(connection: Any) -> Iterable[object]:
    return [field(connection, "_transport")]


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
            ),
        ),
        hints=(
            HolderHint(
                "asyncpg",
                "call `await connection.close()` in a `finally` block; for a pool, use `async with "
                "asyncpg.create_pool(...) as pool:`, or call `await pool.close()`",
            ),
        ),
    ),
)
