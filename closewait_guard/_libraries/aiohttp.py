"""aiohttp: a connector that keeps its idle connections by host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import HolderHint, Library, PoolKind, for_each_call
from closewait_guard._live import elements_of, field, items_of, number_of, type_qualname
from closewait_guard.model import Verdict

__all__ = [
    "LIBRARIES",
]


def _idle(connector: Any) -> Iterable[object]:
    for _, waiting in items_of(field(connector, "_conns")):
        for protocol_and_time in elements_of(waiting):
            yield from (field(each, "transport") for each in elements_of(protocol_and_time)[:1])


def _checked_out(connector: Any) -> Iterable[object]:
    acquired = elements_of(field(connector, "_acquired"))
    return [field(protocol, "transport") for protocol in acquired]


_ONE_SESSION = (
    "make one session and keep it, or use `async with aiohttp.ClientSession() as session:`; "
    "at the end `await session.close()`"
)

LIBRARIES = (
    Library(
        "aiohttp",
        pools=(
            PoolKind(
                ("aiohttp.connector:BaseConnector",),
                lambda connector: f"aiohttp {type_qualname(type(connector))}",
                lambda connector: number_of(field(connector, "_limit")) or None,
                _idle,
                _checked_out,
            ),
        ),
        hints=(
            HolderHint(
                "aiohttp.client_reqrep.ClientResponse",
                "use `async with session.get(...) as response:`, or call response.release() when "
                "it is read or not wanted",
            ),
            HolderHint("aiohttp.client.ClientSession", _ONE_SESSION),
            HolderHint(
                "aiohttp.web_protocol.RequestHandler",
                "the handler of this request must return when its client has gone; a "
                "WebSocketResponse ends by `await ws.close()`",
            ),
            HolderHint(for_each_call("aiohttp"), _ONE_SESSION),
            HolderHint(
                "aiohttp",
                "nothing is lost: the pool replaces it when it is next used; to have fewer of "
                "them, let the client's idle time end first: TCPConnector(keepalive_timeout=...)",
                (Verdict.STALE_POOL,),
            ),
        ),
    ),
)
