"""aiohttp: a connector that keeps its idle connections by host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard.integrations._pool import PoolKind

__all__ = ["POOLS"]


def _socket(protocol: Any) -> object:
    return protocol.transport.get_extra_info("socket")


def _idle(connector: Any) -> Iterable[object]:
    for kept in list(connector._conns.values()):
        for protocol, *_ in list(kept):
            if protocol.transport is not None:
                yield _socket(protocol)


def _busy(connector: Any) -> Iterable[object]:
    return [
        _socket(protocol)
        for protocol in list(connector._acquired)
        if getattr(protocol, "transport", None) is not None
    ]


POOLS = (
    PoolKind(
        "aiohttp",
        ("aiohttp.connector:BaseConnector",),
        lambda connector: f"aiohttp {type(connector).__name__}",
        lambda connector: connector.limit or None,
        _idle,
        _busy,
    ),
)
