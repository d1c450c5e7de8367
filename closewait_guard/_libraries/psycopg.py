"""psycopg, psycopg_pool and psycopg2: connections whose sockets libpq has opened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from closewait_guard._enums import Verdict
from closewait_guard._libraries.kinds import (
    CheckoutKind,
    HandleKind,
    HolderHint,
    Library,
    NativeCode,
    OwnerKind,
    PoolKind,
    for_each_call,
    give_back,
    itself,
)
from closewait_guard._live import (
    MISSING,
    call_native,
    elements_of,
    field,
    find_classes,
    is_a,
    is_exactly,
    layers_of,
    native_field,
    number_of,
    text_of,
)

__all__ = [
    "LIBRARIES",
    "databases_of",
    "libpq_descriptor",
]


_LIBPQ = ("psycopg_binary.pq:PGconn", "psycopg_c.pq:PGconn", "psycopg.pq.pq_ctypes:PGconn")
_PSYCOPG2 = ("psycopg2.extensions:connection",)
_FUTURES = ("_asyncio:Future",)
_POOLS = ("psycopg_pool:ConnectionPool", "psycopg_pool:AsyncConnectionPool")
# As libpq numbers them: PQTRANS_IDLE.
_TRANSACTION_IDLE = 0


def _of_libpq(pgconn: Any) -> Iterable[int]:
    if is_exactly(pgconn, find_classes(_LIBPQ).values()):
        yield int(pgconn.socket)


def libpq_descriptor(connection: Any) -> int | None:
    """That of a connection of psycopg or psycopg2, or of what wraps one; None if it has none."""
    classes = find_classes((*_LIBPQ, *_PSYCOPG2))
    psycopg2 = classes.pop(_PSYCOPG2[0], None)
    for layer in layers_of(connection) if classes or psycopg2 is not None else ():
        # What is closed refuses to answer.
        with suppress(Exception):
            if is_exactly(layer, classes.values()):
                return int(layer.socket)
            if psycopg2 is not None and is_a(layer, psycopg2):
                return int(call_native(layer, psycopg2, "fileno"))
    return None


def databases_of(connections: Iterable[object]) -> Iterator[object]:
    """The database that the first of some connections is to, and the user, as far as is known."""
    classes = find_classes((*_LIBPQ, *_PSYCOPG2))
    psycopg2 = classes.pop(_PSYCOPG2[0], None)
    for connection in islice(connections, 1):
        for layer in layers_of(connection):
            if is_exactly(layer, classes.values()):
                yield from (field(layer, "db"), field(layer, "user"))
            elif psycopg2 is not None:
                yield native_field(layer, psycopg2, "dsn")
            # That of asyncpg.
            yield from elements_of(field(layer, "_params"))[:3:2]


def _purpose_of_connection(connection: Any) -> Iterable[object]:
    return databases_of([connection])


def _purpose_of_pool(pool: Any) -> Iterable[object]:
    return databases_of(elements_of(field(pool, "_pool")))


def _connections(connection: Any) -> Iterable[object]:
    fd = libpq_descriptor(connection)
    return () if fd is None else (fd,)


def _is_closed(connection: Any) -> bool:
    # Those of a pool, which have the attribute, are closed by that.
    is_of_pool = field(connection, "_pool", MISSING) is not MISSING
    return is_of_pool or field(connection, "_closed") is not False


def _is_idle(connection: Any) -> bool:
    """Whether no transaction is under way, nor a query."""
    pgconn = field(connection, "pgconn")
    known = is_exactly(pgconn, find_classes(_LIBPQ).values())
    return known and int(pgconn.transaction_status) == _TRANSACTION_IDLE


def _idle(pool: Any) -> Iterable[object]:
    found = (libpq_descriptor(each) for each in elements_of(field(pool, "_pool")))
    return [fd for fd in found if fd is not None]


def _workers(pool: Any) -> Iterable[object]:
    return [*elements_of(field(pool, "_workers")), field(pool, "_sched_runner")]


def _loop_of(pool: Any) -> object:
    """The event loop of its tasks, if it is asynchronous."""
    task = field(pool, "_sched_runner")
    for cls in find_classes(_FUTURES).values():
        if is_a(task, cls):
            return call_native(task, cls, "get_loop")
    return None


def _name(pool: Any) -> str:
    return f"psycopg_pool {text_of(field(pool, 'name')) or ''}".rstrip()


def _max_size(pool: Any) -> int | None:
    # Zero is that of a pool without a bound.
    return number_of(field(pool, "_max_size")) or None


def _is_out(connection: Any) -> bool:
    return field(connection, "_pool") is not None


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
        "psycopg_pool",
        pools=(
            PoolKind(
                _POOLS,
                _name,
                _max_size,
                _idle,
                waiting=lambda pool: elements_of(field(pool, "_waiting")),
            ),
        ),
        checkouts=tuple(
            CheckoutKind(
                "psycopg_pool",
                name,
                _name,
                _max_size,
                _is_out,
                itself,
                itself,
                takes="getconn",
                gives_back="putconn",
            )
            for name in _POOLS
        ),
        owners=tuple(
            OwnerKind(
                name,
                name.replace(":", "."),
                lambda pool: field(pool, "_closed") is not False,
                _idle,
                loop=_loop_of,
                threads=_workers,
                purpose=_purpose_of_pool,
            )
            for name in _POOLS
        ),
        hints=(
            give_back(
                "psycopg_pool",
                "use `with pool.connection() as connection:` (`async with`), or call "
                "pool.putconn(connection) in a `finally` block",
            ),
            HolderHint(
                for_each_call("psycopg_pool"),
                "make one pool and use it for all calls, or call pool.close()",
            ),
            HolderHint(
                "psycopg_pool",
                "use ConnectionPool(..., check=ConnectionPool.check_connection), or max_idle=... "
                "below the server's timeout: the next query on this connection would fail",
                (Verdict.STALE_POOL,),
            ),
            HolderHint(
                "psycopg_pool",
                "use one pool for all calls, and `with ConnectionPool(...) as pool:` (`async with` "
                "for AsyncConnectionPool), or call pool.close() when the program ends",
            ),
        ),
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
        owners=tuple(
            OwnerKind(
                f"psycopg:{name}",
                f"psycopg.{name}",
                _is_closed,
                _connections,
                is_idle=_is_idle,
                part_of=("sqlalchemy",),
                purpose=_purpose_of_connection,
            )
            for name in ("Connection", "AsyncConnection")
        ),
        native=(
            NativeCode("psycopg_c", "psycopg-c", "libpq", "libpq"),
            NativeCode("psycopg_binary", "psycopg-binary", "libpq", "libpq"),
        ),
    ),
)
