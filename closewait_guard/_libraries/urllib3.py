"""urllib3, and with it requests and botocore: a queue of idle connections for each host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from closewait_guard._enums import Verdict
from closewait_guard._libraries.kinds import (
    NOT_GIVEN_BACK,
    CheckoutKind,
    HolderHint,
    Library,
    OwnerKind,
    PoolKind,
    for_each_call,
    give_back,
    itself,
    never,
    nothing,
    out_of_use,
    read_response,
    waiting_for,
)
from closewait_guard._live import elements_of, field, items_of, number_of, text_of, type_qualname

__all__ = [
    "LIBRARIES",
]


def _name(pool: Any) -> str:
    scheme, host = text_of(field(pool, "scheme")), text_of(field(pool, "host"))
    port = number_of(field(pool, "port"))
    return f"urllib3 pool of {scheme}://{host}:{port}"


def _max_size(pool: Any) -> int | None:
    return number_of(field(field(pool, "pool"), "maxsize")) or None


def _idle(pool: Any) -> Iterable[object]:
    return elements_of(field(field(pool, "pool"), "queue"))


def _checked_out(response: Any) -> Iterable[object]:
    return [field(response, "_connection")]


def _most_out(pool: Any) -> int | None:
    # Without `block`, it opens more where all are out, and closes them when they are given back.
    return _max_size(pool) if field(pool, "block") is True else None


def _socket(connection: Any) -> object:
    return field(connection, "sock")


def _is_waiting(connection: Any) -> bool:
    """Whether a request was begun, and its answer has not."""
    return text_of(field(connection, _STATE)) not in (None, "Idle")


def _pools_of_manager(manager: Any) -> list[object]:
    return [pool for _, pool in items_of(field(field(manager, "pools"), "_container"))]


def _pools_of_session(session: Any) -> Iterator[object]:
    for _, adapter in items_of(field(session, "adapters")):
        yield from _pools_of_manager(field(adapter, "poolmanager"))


def _pools_of_botocore(client: Any) -> list[object]:
    return _pools_of_manager(field(field(field(client, "_endpoint"), "http_session"), "_manager"))


def _kind(
    owner_class: str,
    name: str,
    pools: Callable[[Any], Iterable[object]],
    part_of: tuple[str, ...] = (),
) -> OwnerKind:
    return OwnerKind(
        owner_class,
        name,
        never,
        lambda owner: (each for pool in pools(owner) for each in _idle(pool)),
        # Pools of urllib3 close their connections when they are collected.
        closes_itself=True,
        part_of=part_of,
        # The hosts by name, and what a client of botocore is for.
        purpose=lambda owner: [
            type_qualname(type(owner)),
            *(field(pool, "host") for pool in pools(owner) if any(_idle(pool))),
        ],
    )


_KEEP_THE_CONTENT = (
    "close the session or client when you are done, and keep response.content or "
    "response.json() instead of the response: also one that was read and closed keeps "
    "its pool, and the idle connection in that"
)

# Of http.client.
_STATE = "_HTTPConnection__state"

_STREAMED = (
    "use `with session.get(..., stream=True) as response:`, call response.close(), or read it to "
    "the end"
)

LIBRARIES = (
    Library(
        "requests",
        owners=(_kind("requests.sessions:Session", "requests.Session", _pools_of_session),),
        hints=(
            HolderHint(out_of_use("urllib3"), _KEEP_THE_CONTENT),
            HolderHint(read_response("urllib3"), _KEEP_THE_CONTENT),
            HolderHint(
                "requests.models.Response",
                f"close the streamed response: {_STREAMED}",
                NOT_GIVEN_BACK,
            ),
            HolderHint(
                "requests.api",
                "close the streamed response: use `with requests.get(..., stream=True) as "
                "response:`, call response.close(), or read it to the end",
                (Verdict.DROPPED,),
            ),
        ),
    ),
    Library(
        "botocore",
        owners=(_kind("botocore.client:BaseClient", "botocore client", _pools_of_botocore),),
        hints=(
            HolderHint(
                "botocore.client.BaseClient",
                "reuse one client, or call client.close() after use",
                (Verdict.SURPLUS,),
            ),
            HolderHint(
                "botocore.response.StreamingBody",
                'close the body: use `with contextlib.closing(response["Body"]) as body:`, call '
                "body.close(), or read it to the end",
                NOT_GIVEN_BACK,
            ),
        ),
    ),
    Library(
        "urllib3",
        pools=(
            PoolKind(
                ("urllib3.connectionpool:HTTPConnectionPool",),
                _name,
                _max_size,
                _idle,
                waiting=lambda pool: waiting_for(field(pool, "pool")),
                # A session that is closed lets go of its pools, but a response keeps its own.
                kept_by=("urllib3.response:HTTPResponse",),
            ),
            # The pool does not know what is checked out of it, but the response knows its pool.
            PoolKind(
                ("urllib3.response:HTTPResponse",),
                lambda response: _name(field(response, "_pool")),
                lambda response: _max_size(field(response, "_pool")),
                nothing,
                _checked_out,
            ),
        ),
        checkouts=(
            CheckoutKind(
                "urllib3",
                "urllib3.connectionpool:HTTPConnectionPool",
                _name,
                _most_out,
                # Its socket is closed by a response that was closed and not released.
                lambda connection: _socket(connection) is not None,
                _socket,
                itself,
                takes="_get_conn",
                gives_back="_put_conn",
                is_busy=_is_waiting,
            ),
        ),
        owners=(
            _kind(
                "urllib3.poolmanager:PoolManager",
                "urllib3.PoolManager",
                _pools_of_manager,
                ("requests", "botocore"),
            ),
            _kind(
                "urllib3.connectionpool:HTTPConnectionPool",
                "urllib3.HTTPConnectionPool",
                lambda pool: [pool],
                ("urllib3.poolmanager",),
            ),
        ),
        hints=(
            HolderHint(
                "urllib3.response.HTTPResponse",
                "read the response to the end and call response.release_conn(), or call "
                "response.close()",
                NOT_GIVEN_BACK,
            ),
            # After those of all responses, before those of all clients.
            give_back("urllib3", _STREAMED),
            HolderHint(
                "requests.sessions.Session",
                "reuse one Session, or use `with requests.Session() as session:`",
            ),
            HolderHint(
                "urllib3.connectionpool.HTTPConnectionPool",
                "reuse one pool, or use `with urllib3.HTTPConnectionPool(...) as pool:`",
                (Verdict.SURPLUS,),
            ),
            HolderHint(
                "urllib3.poolmanager.PoolManager",
                "reuse one PoolManager, or use `with urllib3.PoolManager() as http:`",
            ),
            HolderHint(
                for_each_call("urllib3"),
                "reuse one PoolManager, Session or client, or close it after use",
            ),
        ),
    ),
)
