"""urllib3, and with it requests and botocore: a queue of idle connections for each host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import PoolKind, nothing
from closewait_guard._live import elements_of, field, number_of, text_of

__all__ = [
    "POOLS",
]


def _name(pool: Any) -> str:
    scheme, host = text_of(field(pool, "scheme")), text_of(field(pool, "host"))
    port = number_of(field(pool, "port"))
    return f"urllib3 pool of {scheme}://{host}:{port}"


def _most(pool: Any) -> int | None:
    return number_of(field(field(pool, "pool"), "maxsize")) or None


def _idle(pool: Any) -> Iterable[object]:
    return elements_of(field(field(pool, "pool"), "queue"))


def _busy(response: Any) -> Iterable[object]:
    return [field(response, "_connection")]


POOLS = (
    PoolKind("urllib3", ("urllib3.connectionpool:HTTPConnectionPool",), _name, _most, _idle),
    # The pool does not know what is checked out of it, but the response knows its pool.
    PoolKind(
        "urllib3",
        ("urllib3.response:HTTPResponse",),
        lambda response: _name(field(response, "_pool")),
        lambda response: _most(field(response, "_pool")),
        nothing,
        _busy,
    ),
)
