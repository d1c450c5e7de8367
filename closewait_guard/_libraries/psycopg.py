"""psycopg and psycopg2: connections whose sockets libpq has opened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import HandleKind, HolderHint, Library, NativeCode
from closewait_guard._live import call_native, field, find_classes, is_a, is_exactly

__all__ = [
    "LIBRARIES",
]


_LIBPQ = ("psycopg_binary.pq:PGconn", "psycopg_c.pq:PGconn", "psycopg.pq.pq_ctypes:PGconn")
_PSYCOPG2 = ("psycopg2.extensions:connection",)


def _of_libpq(pgconn: Any) -> Iterable[int]:
    if is_exactly(pgconn, find_classes(_LIBPQ).values()):
        yield int(pgconn.socket)


def _of_connection(connection: Any) -> Iterable[int]:
    return _of_libpq(field(connection, "pgconn"))


def _of_psycopg2(connection: Any) -> Iterable[int]:
    for cls in find_classes(_PSYCOPG2).values():
        if is_a(connection, cls):
            yield int(call_native(connection, cls, "fileno"))


LIBRARIES = (
    Library(
        "psycopg2",
        handles=(HandleKind(_PSYCOPG2, _of_psycopg2),),
        attributed=("psycopg2:connect",),
        hints=(
            HolderHint(
                "psycopg2",
                "call connection.close(), or use `with "
                "contextlib.closing(psycopg2.connect(...)) as connection:`; `with connection:` "
                "only ends the transaction",
            ),
        ),
        native=(NativeCode("psycopg2", "psycopg2", "libpq", "libpq"),),
    ),
    Library(
        "psycopg",
        handles=(HandleKind(("psycopg:Connection", "psycopg:AsyncConnection"), _of_connection),),
        inner=(HandleKind(_LIBPQ, _of_libpq),),
        attributed=(
            "psycopg:connect",
            "psycopg:Connection.connect",
            "psycopg:AsyncConnection.connect",
        ),
        hints=(
            HolderHint(
                "psycopg",
                "use `with psycopg.connect(...) as connection:`, or call connection.close()",
            ),
        ),
        native=(
            NativeCode("psycopg_c", "psycopg-c", "libpq", "libpq"),
            NativeCode("psycopg_binary", "psycopg-binary", "libpq", "libpq"),
        ),
    ),
)
