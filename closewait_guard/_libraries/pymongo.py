"""pymongo: a client with a pool for each server, and monitors with connections of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from closewait_guard._cpython import THREAD_NAME, threads
from closewait_guard._libraries.kinds import HolderHint, Library, OwnerKind
from closewait_guard._live import elements_of, field, items_of, text_of

__all__ = [
    "LIBRARIES",
]


def _is_closed(client: Any) -> bool:
    return field(client, "_closed") is not False or field(client, "_opened") is False


def _connections(client: Any) -> Iterator[object]:
    for _, server in items_of(field(field(client, "_topology"), "_servers")):
        pools = field(server, "_pool"), field(field(server, "_monitor"), "_pool")
        for connection in (each for pool in pools for each in elements_of(field(pool, "conns"))):
            interface = field(connection, "conn")
            inner = field(interface, "conn", interface)
            # Of an asynchronous one: its transport, and the protocol of that.
            yield from elements_of(inner)[:1] or [inner]


def _own_threads(_: Any) -> Iterable[object]:
    """Those of all clients: a client shows its own by proxies only."""
    return [
        thread
        for thread in threads.copy().values()
        if (text_of(field(thread, THREAD_NAME)) or "").startswith("pymongo_")
    ]


LIBRARIES = (
    Library(
        "pymongo",
        owners=tuple(
            OwnerKind(
                f"pymongo.{part}.mongo_client:{name}",
                f"pymongo.{name}",
                _is_closed,
                _connections,
                loop=lambda client: field(client, "_loop"),
                threads=_own_threads,
                purpose=lambda client: [field(client, "_default_database_name")],
            )
            for part, name in (("synchronous", "MongoClient"), ("asynchronous", "AsyncMongoClient"))
        ),
        hints=(
            HolderHint(
                "pymongo",
                "use one MongoClient for all calls, and call client.close() when the program ends "
                "(`await client.close()` for AsyncMongoClient)",
            ),
        ),
    ),
)
