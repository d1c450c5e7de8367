"""What to change in the program, by verdict, origin and evidence; libraries have hints besides."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from closewait_guard.model import Connection, Evidence, Origin, Verdict

__all__ = [
    "HINTS",
    "Hint",
    "hint_for",
]


class Hint(NamedTuple):
    """One row: the sentence is for sockets that fit everything that is given.

    Attributes:
        sentence: What to do.
        reason: Why it is to be done. It comes before the sentence, or before that of a library.
        is_replaced: Only for a socket whose place a newer one has taken.
    """

    verdict: Verdict
    sentence: str
    origin: Origin | None = None
    evidence: Evidence | None = None
    connection: Connection | None = None
    is_replaced: bool = False
    reason: str = ""

    def text(self, of_library: str = "") -> str:
        """The reason, and what to do; what a library says of its objects is more exact."""
        what = of_library or self.sentence
        return f"{self.reason}: {what}" if self.reason else what

    def fits(
        self,
        verdict: Verdict,
        origin: Origin,
        evidence: Evidence,
        connection: Connection,
        *,
        is_replaced: bool,
    ) -> bool:
        """Whether the row is for such a socket."""
        return (
            self.verdict is verdict
            and self.origin in (None, origin)
            and self.evidence in (None, evidence)
            and self.connection in (None, connection)
            and self.is_replaced <= is_replaced
        )


# The first row that fits is taken.
HINTS: tuple[Hint, ...] = (
    Hint(
        Verdict.LEAKED,
        "the handler of this connection must close it when recv() returns b'': use "
        "`with conn:` around the handler, error paths included",
        Origin.ACCEPTED,
    ),
    *(
        Hint(
            verdict,
            "the same line has connected again since: close a connection when it is used up, by "
            "`with` or in a finally block, and in any case before a new one takes its place",
            is_replaced=True,
        )
        for verdict in (Verdict.LEAKED, Verdict.DEAD, Verdict.LINGERING)
    ),
    Hint(
        Verdict.LEAKED,
        "a duplicate has a descriptor of its own: close it too, or do not duplicate",
        Origin.DUPLICATED,
    ),
    # After close() was called, there is a new owner, and a file object of its own.
    *(
        Hint(
            verdict,
            "the descriptor was handed over by detach(): what took it must close it, "
            "by close() of its new owner or os.close(fd)",
            Origin.DETACHED,
        )
        for verdict in (Verdict.LEAKED, Verdict.DEAD, Verdict.DROPPED, Verdict.OPEN)
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
        # Only TCP_INFO distinguishes a connect that failed from none.
        for evidence in (Evidence.POLL, Evidence.TABLE)
    ),
    Hint(
        Verdict.DEAD,
        "the connection failed or ended, the descriptor is still taken: call close() in the "
        "error path, e.g. in an `except OSError` or a finally block",
    ),
    Hint(
        Verdict.DROPPED,
        "close() it before the last variable goes; often an exception's traceback is part of it",
        evidence=Evidence.COLLECTED,
        reason="it was kept in a reference cycle until the garbage collector ran",
    ),
    Hint(
        Verdict.DROPPED,
        "use `with`, or close() in a finally block",
        reason="the last variable that held it went without a close()",
    ),
    Hint(
        Verdict.LINGERING,
        "close() was called, but a file object from makefile() keeps the descriptor: close that "
        "too",
        Origin.ACCEPTED,
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
    *,
    is_replaced: bool = False,
    of_library: str = "",
) -> str:
    """One sentence that says what to change; empty for what no row is for.

    Args:
        verdict: What is thought of the socket.
        origin: How the descriptor came to be.
        evidence: What the verdict rests on.
        connection: What is left of its connection.
        is_replaced: Whether the same line has connected again since.
        of_library: What a library says that is to be done; empty where none does.
    """
    rows = (
        row
        for row in HINTS
        if row.fits(verdict, origin, evidence, connection, is_replaced=is_replaced)
    )
    return next((row.text(of_library) for row in rows), of_library)
