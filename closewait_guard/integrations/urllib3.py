"""urllib3, and with it requests and botocore: a queue of idle connections for each host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard.integrations._pool import PoolKind, nothing

__all__ = ["POOLS"]


def _name(pool: Any) -> str:
    return f"urllib3 pool of {pool.scheme}://{pool.host}:{pool.port}"


def _most(pool: Any) -> int | None:
    return int(pool.pool.maxsize) or None


def _idle(pool: Any) -> Iterable[object]:
    return [connection.sock for connection in list(pool.pool.queue) if connection is not None]


def _busy(response: Any) -> Iterable[object]:
    return [response._connection.sock]


POOLS = (
    PoolKind("urllib3", ("urllib3.connectionpool:HTTPConnectionPool",), _name, _most, _idle),
    # The pool does not know what is checked out of it, but the response knows its pool.
    PoolKind(
        "urllib3",
        ("urllib3.response:HTTPResponse",),
        lambda response: _name(response._pool),
        lambda response: _most(response._pool),
        nothing,
        _busy,
    ),
)
