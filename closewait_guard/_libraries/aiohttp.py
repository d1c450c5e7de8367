"""aiohttp: a connector that keeps its idle connections by host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._enums import Verdict
from closewait_guard._libraries.kinds import (
    HolderHint,
    Library,
    OwnerKind,
    PoolKind,
    for_each_call,
    read_response,
)
from closewait_guard._live import elements_of, field, items_of, number_of, type_qualname

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


def _waiting(connector: Any) -> Iterable[object]:
    for _, waiting in items_of(field(connector, "_waiters")):
        yield from elements_of(waiting) or (future for future, _ in items_of(waiting))


def _hosts(connector: Any) -> Iterable[object]:
    """The names of the hosts that its idle connections are to."""
    return [
        each for key, _ in items_of(field(connector, "_conns")) for each in elements_of(key)[:1]
    ]


def _is_closed(session: Any) -> bool:
    connector = field(session, "_connector")
    return connector is None or field(session, "_connector_owner") is False


def _connections(session: Any) -> Iterable[object]:
    connector = field(session, "_connector")
    return [*_idle(connector), *_checked_out(connector)]


_ONE_SESSION = (
    "reuse one ClientSession and `await session.close()` on shutdown, or use `async with "
    "aiohttp.ClientSession() as session:`"
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
                _waiting,
                purpose=_hosts,
            ),
        ),
        owners=(
            OwnerKind(
                "aiohttp.client:ClientSession",
                "aiohttp.ClientSession",
                _is_closed,
                _connections,
                loop=lambda session: field(session, "_loop"),
                purpose=lambda session: _hosts(field(session, "_connector")),
            ),
        ),
        hints=(
            HolderHint(
                read_response("aiohttp"),
                "`await session.close()` when you are done, or use `async with "
                "aiohttp.ClientSession() as session:`; the response was read, and its session "
                "keeps the idle connection",
            ),
            HolderHint(
                "aiohttp.client_reqrep.ClientResponse",
                "use `async with session.get(...) as response:`, or call response.release()",
            ),
            HolderHint("aiohttp.client.ClientSession", _ONE_SESSION),
            HolderHint(
                "aiohttp.web_protocol.RequestHandler",
                "return from the handler when the client disconnects; end a WebSocketResponse with "
                "`await ws.close()`",
            ),
            HolderHint(for_each_call("aiohttp"), _ONE_SESSION),
            HolderHint(
                "aiohttp",
                "not a leak: the pool discards it on next use; for fewer of them, set "
                "TCPConnector(keepalive_timeout=...) below the server's keep-alive time",
                (Verdict.STALE_POOL,),
            ),
        ),
    ),
)
