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


def _connector(owner: Any) -> object:
    """That of a session, or a connector itself."""
    return field(owner, "_connector", owner)


def _own_connector(session: Any) -> object:
    return None if field(session, "_connector_owner") is False else field(session, "_connector")


def _is_closed(owner: Any) -> bool:
    connector = _connector(owner)
    is_lent = field(owner, "_connector_owner") is False
    return connector is None or is_lent or field(connector, "_closed") is True


def _connections(owner: Any) -> Iterable[object]:
    connector = _connector(owner)
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
                part=_own_connector,
            ),
            # Where sessions share it; that of one session is a part of that.
            OwnerKind(
                "aiohttp.connector:BaseConnector",
                "aiohttp connector",
                _is_closed,
                _connections,
                loop=lambda connector: field(connector, "_loop"),
                part_of=("aiohttp.client",),
                purpose=_hosts,
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
                "aiohttp.connector.BaseConnector",
                "reuse one connector, and `await connector.close()` on shutdown: a session with "
                "connector_owner=False does not close it",
                (Verdict.UNCLOSED, Verdict.SURPLUS),
            ),
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
