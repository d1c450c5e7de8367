"""One row of the table of hints, and for which sockets it is.

What to change in the program, by verdict, origin, evidence and holder: data only.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from closewait_guard.model import Connection, Evidence, Origin, Verdict

__all__ = [
    "HINTS",
    "Hint",
    "held",
    "hint_for",
]


class Hint(NamedTuple):
    """One row: where everything that is given fits, the sentence is told.

    Attributes:
        holder: The name of a type that holds the socket, such as `requests.models.Response`, or of
            a package: then any of its types. "X for each call": pools of the library X, more than
            a program has reason to make. "reconnect": a younger one has taken its place.
    """

    verdict: Verdict
    sentence: str
    origin: Origin | None = None
    evidence: Evidence | None = None
    holder: str | None = None
    connection: Connection | None = None

    def fits(
        self,
        verdict: Verdict,
        origin: Origin,
        evidence: Evidence,
        connection: Connection,
        holders: Iterable[str],
    ) -> bool:
        """Whether the row is for such a socket."""
        return (
            self.verdict is verdict
            and self.origin in (None, origin)
            and self.evidence in (None, evidence)
            and self.connection in (None, connection)
            and (self.holder is None or any(_is_of(name, self.holder) for name in holders))
        )


def _is_of(name: str, holder: str) -> bool:
    return name == holder or name.startswith(holder + ".")


def held(holder: str, sentence: str) -> tuple[Hint, ...]:
    """For a socket that is open too long while something of a library holds it."""
    return tuple(
        Hint(verdict, sentence, holder=holder)
        for verdict in (Verdict.LEAKED, Verdict.DEAD, Verdict.LINGERING)
    )


# The first row that fits is taken: what a program holds before what that holds in turn.
HINTS: tuple[Hint, ...] = (
    *held(
        "traceback",
        "an exception that is kept keeps its frames and their variables: close the socket in a "
        "finally block, and do not store the exception longer than needed",
    ),
    *held(
        "requests.models.Response",
        "read the response to its end, or use `with session.get(..., stream=True) as response:`, "
        "or call response.close()",
    ),
    *held(
        "requests.sessions.Session",
        "make one session and keep it, or use `with requests.Session() as session:`",
    ),
    *held(
        "botocore.response.StreamingBody",
        "read the body to its end, or call body.close(); `with contextlib.closing(body):` does",
    ),
    *held(
        "urllib3.response.HTTPResponse",
        "read the response to its end and call response.release_conn(), or response.close()",
    ),
    *held(
        "urllib3 for each call",
        "make one PoolManager, session or client and keep it, or close it when it is used up",
    ),
    *held(
        "httpx.Response",
        "use `with client.stream(...) as response:` (`async with` for an AsyncClient), or call "
        "response.close() (`await response.aclose()`)",
    ),
    *held(
        "httpx.Client",
        "make one client and keep it, or use `with httpx.Client() as client:`",
    ),
    *held(
        "httpx.AsyncClient",
        "make one client and keep it, or use `async with httpx.AsyncClient() as client:`",
    ),
    *held(
        "httpcore for each call",
        "make one client and keep it, or use `with httpx.Client() as client:` (`async with` for an "
        "AsyncClient)",
    ),
    *held(
        "aiohttp.client_reqrep.ClientResponse",
        "use `async with session.get(...) as response:`, or call response.release() when it is "
        "read or not wanted",
    ),
    *held(
        "aiohttp.client.ClientSession",
        "make one session and keep it, or use `async with aiohttp.ClientSession() as session:`; "
        "at the end `await session.close()`",
    ),
    *held(
        "aiohttp for each call",
        "make one session and keep it, or use `async with aiohttp.ClientSession() as session:`; "
        "at the end `await session.close()`",
    ),
    *held(
        "redis for each call",
        "make one client and keep it: it has a pool of connections; or call client.close() "
        "(`await client.aclose()`)",
    ),
    *held(
        "redis",
        "give the connection back: call client.close() (`await client.aclose()`), or use "
        "`with redis.Redis(...) as client:`; a pubsub or pipeline has a close() or reset() too",
    ),
    *held(
        "sqlalchemy.engine.base.Connection",
        "use `with engine.connect() as connection:`, or call connection.close(), which gives it "
        "back to the pool",
    ),
    *held(
        "sqlalchemy for each call",
        "make one engine and keep it, or call engine.dispose() when it is used up",
    ),
    *held(
        "psycopg",
        "use `with psycopg.connect(...) as connection:`, or call connection.close()",
    ),
    *held(
        "psycopg2",
        "call connection.close(): `with connection:` ends the transaction only; "
        "`with contextlib.closing(psycopg2.connect(...)) as connection:` closes",
    ),
    *held(
        "pycurl.Curl",
        "call curl.close() when the handle is not used again",
    ),
    *held(
        "websockets",
        "use `async with connect(...) as websocket:` (`with` for the threaded client), or "
        "`await websocket.close()`",
    ),
    *held(
        "trio",
        "use `async with stream:`, or `await stream.aclose()`",
    ),
    *held(
        "http.client.HTTPResponse",
        "read the response to its end, or use `with` around it, or call response.close()",
    ),
    *held(
        "http.client.HTTPConnection",
        "call connection.close(), which does not close a response that is being read: close the "
        "response too; `with contextlib.closing(connection):` helps",
    ),
    Hint(
        Verdict.LEAKED,
        "the handler of this connection must end it: `writer.close()` and "
        "`await writer.wait_closed()` in a finally block",
        Origin.ACCEPTED,
        holder="asyncio",
    ),
    *held(
        "asyncio",
        "`writer.close()` and `await writer.wait_closed()` in a finally block; for a bare "
        "transport transport.close()",
    ),
    *held(
        "uvloop",
        "`writer.close()` and `await writer.wait_closed()` in a finally block; for a bare "
        "transport transport.close()",
    ),
    Hint(
        Verdict.LEAKED,
        "the handler of this connection must close it when recv() returns b'': use "
        "`with conn:` around the handler, error paths included",
        Origin.ACCEPTED,
    ),
    *held(
        "reconnect",
        "the same line has connected again since: close a connection when it is used up, by "
        "`with` or in a finally block, and in any case before a new one takes its place",
    ),
    Hint(
        Verdict.LEAKED,
        "a duplicate has a descriptor of its own: close it too, or do not duplicate",
        Origin.DUPLICATED,
    ),
    Hint(
        Verdict.LEAKED,
        "the descriptor was handed over by detach(): whoever took it must close it, "
        "by close() of its new owner or os.close(fd)",
        Origin.DETACHED,
    ),
    Hint(
        Verdict.LEAKED,
        "its owner must call close() on it when reading returns 0 bytes, which says that the peer "
        "has closed",
        Origin.NATIVE,
    ),
    Hint(
        Verdict.LEAKED,
        "close it where it is used up: `with` around the socket, response, session or client, "
        "or close() in a finally block, also when the response is not read to its end",
    ),
    Hint(
        Verdict.DEAD,
        "it was never connected: close() it on every path that neither connects it nor listens, "
        "errors included, or make it only when it is needed; `with` around it helps",
        connection=Connection.NEVER_CONNECTED,
    ),
    *(
        Hint(
            Verdict.DEAD,
            "the connection failed, ended or was never made, the descriptor is still taken: call "
            "close() in the error path and on every path that does not connect, or use `with`",
            evidence=evidence,
            connection=Connection.UNCONNECTED,
        )
        # Only TCP_INFO tells a connect that failed from none.
        for evidence in (Evidence.POLL, Evidence.TABLE)
    ),
    Hint(
        Verdict.DEAD,
        "the connection failed or ended, the descriptor is still taken: call close() in the "
        "error path, e.g. in an `except OSError` or a finally block",
    ),
    Hint(
        Verdict.DROPPED,
        "it was kept in a reference cycle until the garbage collector ran, often by an "
        "exception's traceback: close() it before the last variable goes",
        evidence=Evidence.COLLECTED,
    ),
    Hint(
        Verdict.DROPPED,
        "the last variable that held it went without a close(): use `with`, or close() in a "
        "finally block",
    ),
    Hint(
        Verdict.LINGERING,
        "close() was called, but a file object from makefile() keeps the descriptor: close that "
        "too, or the response that reads from it",
    ),
    Hint(
        Verdict.INHERITED,
        "this copy came over fork(): close it in the child, or open it after the fork",
    ),
    Hint(
        Verdict.CLOSED_ELSEWHERE,
        "something has called os.close() on the number of this socket, or closed another object "
        "made of the same number: its own close() will now close what has the number since; let "
        "one owner close it, and use sock.detach() to hand the number over",
    ),
    Hint(
        Verdict.STALE_POOL,
        "nothing is lost: the pool replaces it when it is next used; to have fewer of them, let "
        "the client's idle time end first: httpx.Limits(keepalive_expiry=...)",
        holder="httpcore",
    ),
    Hint(
        Verdict.STALE_POOL,
        "nothing is lost: the pool replaces it when it is next used; to have fewer of them, let "
        "the client's idle time end first: TCPConnector(keepalive_timeout=...)",
        holder="aiohttp",
    ),
    Hint(
        Verdict.STALE_POOL,
        "nothing is lost: the pool replaces it when it is next used; health_check_interval=... "
        "finds it earlier, and the server's `timeout` decides how long it keeps idle clients",
        holder="redis",
    ),
    Hint(
        Verdict.STALE_POOL,
        "the next query on it would fail: create_engine(..., pool_pre_ping=True) lets the pool "
        "replace it, pool_recycle=... ends it before the server does",
        holder="sqlalchemy",
    ),
    Hint(
        Verdict.STALE_POOL,
        "the pool will replace it when it is next used: nothing to do; to have fewer of them, "
        "let the client's idle time be shorter than the server's",
    ),
    Hint(
        Verdict.HALF_CLOSED,
        "the peer has closed its side and we are still sending: nothing to do unless it stays",
    ),
    Hint(
        Verdict.CLOSING,
        "the connection is ending at this moment: nothing to do unless it stays",
    ),
    Hint(
        Verdict.OPEN,
        "it was opened here and is still open: close() it, or use `with`",
    ),
)


@lru_cache(4096)
def hint_for(
    verdict: Verdict,
    origin: Origin,
    evidence: Evidence,
    connection: Connection,
    holders: tuple[str, ...] = (),
) -> str:
    """One sentence that says what to change.

    Args:
        verdict: What is thought of the socket.
        origin: How the descriptor came to be.
        evidence: What the verdict rests on.
        connection: What is left of its connection.
        holders: The names of the types that hold it.
    """
    seen = (verdict, origin, evidence, connection, holders)
    fitting = (row.sentence for row in HINTS if row.fits(*seen))
    return next(fitting, "")
