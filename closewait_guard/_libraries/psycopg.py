"""psycopg and psycopg2: connections whose sockets libpq has opened."""

from __future__ import annotations

from closewait_guard._libraries.kinds import OwnerKind, own_descriptor

__all__ = [
    "ATTRIBUTED",
    "OWNERS",
]


OWNERS = (
    OwnerKind(("psycopg:Connection", "psycopg:AsyncConnection"), own_descriptor),
    OwnerKind(("psycopg2.extensions:connection",), own_descriptor),
)

ATTRIBUTED = {
    "psycopg": ("psycopg:connect", "psycopg:Connection.connect", "psycopg:AsyncConnection.connect"),
    "psycopg2": ("psycopg2:connect",),
}
