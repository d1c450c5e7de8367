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
        reason: Why it is to be done. It comes after the sentence, or after that of a library.
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
        """What to do, and why; what a library says of its objects is more exact."""
        what = of_library or self.sentence
        return f"{what} ({self.reason})" if self.reason else what

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
        "close the connection when recv() returns b'': wrap the handler in `with conn:`",
        Origin.ACCEPTED,
    ),
    *(
        Hint(
            verdict,
            "close the old connection before reconnecting: use `with`, or close() in a `finally` "
            "block",
            is_replaced=True,
        )
        for verdict in (Verdict.LEAKED, Verdict.DEAD, Verdict.LINGERING)
    ),
    Hint(
        Verdict.LEAKED,
        "close both: dup() and fromfd() create a second descriptor; to hand one over, use detach()",
        Origin.DUPLICATED,
    ),
    # After close() was called, there is a new owner, and a file object of its own.
    *(
        Hint(
            verdict,
            "close what detach() returned: os.close(fd), or close() on the object that took it "
            "over",
            Origin.DETACHED,
        )
        for verdict in (Verdict.LEAKED, Verdict.DEAD, Verdict.DROPPED, Verdict.OPEN)
    ),
    Hint(
        Verdict.LEAKED,
        "call the library's own close method when a read returns 0 bytes",
        Origin.NATIVE,
    ),
    Hint(
        Verdict.LEAKED,
        "close it when you are done: `with` around the socket, response, session or client, "
        "or close() in a `finally` block",
    ),
    Hint(
        Verdict.DEAD,
        "close() it on every path that neither connects nor listens, errors included, or use "
        "`with`: it was never connected",
        connection=Connection.NEVER_CONNECTED,
    ),
    *(
        Hint(
            Verdict.DEAD,
            "call close() in the error path (`except OSError` or `finally`) and where nothing "
            "connects, or use `with`: the connection failed, ended or was never made",
            evidence=evidence,
            connection=Connection.UNCONNECTED,
        )
        # Only TCP_INFO distinguishes a connect that failed from none.
        for evidence in (Evidence.POLL, Evidence.TABLE)
    ),
    Hint(
        Verdict.DEAD,
        "call close() in the error path (`except OSError` or `finally`): the connection "
        "failed or ended, and is still open here",
    ),
    Hint(
        Verdict.DROPPED,
        "close it explicitly, and look for a stored exception or traceback",
        evidence=Evidence.COLLECTED,
        reason="garbage-collected while open, in a reference cycle",
    ),
    Hint(
        Verdict.DROPPED,
        "use `with`, or close() in a `finally` block",
        reason="the last reference went away while it was open",
    ),
    Hint(
        Verdict.LINGERING,
        "close what makefile() returned as well: it still holds the descriptor after close()",
        Origin.ACCEPTED,
    ),
    Hint(
        Verdict.LINGERING,
        "close the makefile() object or response as well: it still holds the descriptor "
        "after close()",
    ),
    Hint(
        Verdict.INHERITED,
        "close it in the child, or open it after forking: it was inherited through fork()",
    ),
    Hint(
        Verdict.SURPLUS,
        "make one and use it for all calls, or close each after use",
    ),
    Hint(
        Verdict.UNCLOSED,
        "close it in a `finally` block, or use it in a `with` block (`async with`)",
    ),
    Hint(
        Verdict.CHECKED_OUT,
        "give it back to its pool: use `with`, or close it in a `finally` block",
    ),
    Hint(
        Verdict.CLOSED_ELSEWHERE,
        "let exactly one owner close it, and transfer ownership with sock.detach(): its "
        "descriptor was closed with os.close() or by another object, and calling close() on "
        "this one would close an unrelated file",
    ),
    Hint(
        Verdict.UNANSWERED,
        "set a timeout in the client, or on the socket by `sock.setsockopt(socket.IPPROTO_TCP, "
        "socket.TCP_USER_TIMEOUT, 30_000)`",
        reason="the peer is gone or cannot be reached, and the kernel goes on trying for up to 15 "
        "minutes",
    ),
    Hint(
        Verdict.IDLE_OR_LEAKED,
        "from outside, an idle pool looks the same as a leak: `closewait-guard attach PID` (Linux) "
        "or install() in the program shows which it is",
        Origin.ADOPTED,
    ),
    Hint(
        Verdict.IDLE_OR_LEAKED,
        "from outside, an idle pool looks the same as a leak: see whether their number grows",
    ),
    Hint(
        Verdict.STALE_POOL,
        "not a leak: the pool discards it on next use; for fewer of them, set the client's "
        "keep-alive time below the server's",
    ),
    Hint(
        Verdict.HALF_CLOSED,
        "the peer has finished sending and this side is still sending: normal unless it persists",
    ),
    Hint(
        Verdict.CLOSING,
        "the connection is closing: normal unless it persists",
    ),
    Hint(
        Verdict.OPEN,
        "use `with`, or close() it: it was opened here and is still open",
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
