"""aiohttp: a connector that keeps its idle connections by host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import PoolKind
from closewait_guard._live import elements_of, field, items_of, number_of, type_qualname

__all__ = [
    "POOLS",
]


def _idle(connector: Any) -> Iterable[object]:
    for _, kept in items_of(field(connector, "_conns")):
        for protocol_and_time in elements_of(kept):
            yield from (field(each, "transport") for each in elements_of(protocol_and_time)[:1])


def _busy(connector: Any) -> Iterable[object]:
    acquired = elements_of(field(connector, "_acquired"))
    return [field(protocol, "transport") for protocol in acquired]


POOLS = (
    PoolKind(
        "aiohttp",
        ("aiohttp.connector:BaseConnector",),
        lambda connector: f"aiohttp {type_qualname(type(connector))}",
        lambda connector: number_of(field(connector, "_limit")) or None,
        _idle,
        _busy,
    ),
)
