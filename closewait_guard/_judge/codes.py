"""The code of each verdict, cause and alert, such as CWG104. A code never changes its meaning.

The first digit is the verdict, 8 for alerts, 9 for owners. `docs/codes.md` has them all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from closewait_guard._enums import SURPLUS_CLIENTS
from closewait_guard.model import AlertKind, Connection, Evidence, Origin, Verdict

__all__ = [
    "ALERT_CODES",
    "CODES",
    "Code",
    "cause_code",
]


class Code(NamedTuple):
    """One cause: the code is for findings that fit everything that is given.

    Attributes:
        name: The code.
        verdict: The verdict on the socket.
        title: The cause in a few words.
        origin: How the descriptor came to be.
        evidence: What the verdict rests on.
        connection: What is left of the connection.
        is_replaced: Only for a socket whose place a newer one has taken.
        owner: Only for a socket that an object of a library holds, whose kind begins with this.
    """

    name: str
    verdict: Verdict
    title: str
    origin: Origin | None = None
    evidence: Evidence | None = None
    connection: Connection | None = None
    is_replaced: bool = False
    owner: str = ""

    def fits(
        self,
        verdict: Verdict,
        origin: Origin,
        evidence: Evidence,
        connection: Connection,
        *,
        is_replaced: bool,
        owner: str,
    ) -> bool:
        """Whether the code is for such a socket."""
        return (
            self.verdict is verdict
            and self.origin in (None, origin)
            and self.evidence in (None, evidence)
            and self.connection in (None, connection)
            and self.is_replaced <= is_replaced
            and owner.startswith(self.owner)
        )


_RESPONSE, _EACH_CALL, _EXCEPTION, _CALL, _CLIENT = (
    "response",
    "client for each call",
    "exception",
    "call",
    "client",
)

# The first row that fits is taken. A new cause gets a new number; none is used again.
CODES: tuple[Code, ...] = (
    Code("CWG104", Verdict.LEAKED, "a response is not closed or read to its end", owner=_RESPONSE),
    Code("CWG103", Verdict.LEAKED, "a new client for each call", owner=_EACH_CALL),
    Code("CWG105", Verdict.LEAKED, "a stored exception keeps the socket", owner=_EXCEPTION),
    Code("CWG111", Verdict.LEAKED, "a call that has not ended holds the socket", owner=_CALL),
    Code(
        "CWG112",
        Verdict.LEAKED,
        "taken from a pool and not given back",
        origin=Origin.CHECKED_OUT,
    ),
    Code(
        "CWG106", Verdict.LEAKED, "a handler does not close its connection", origin=Origin.ACCEPTED
    ),
    Code("CWG102", Verdict.LEAKED, "a client or connection is not closed", owner=_CLIENT),
    Code("CWG107", Verdict.LEAKED, "not closed before reconnecting", is_replaced=True),
    Code("CWG108", Verdict.LEAKED, "a duplicate is not closed", origin=Origin.DUPLICATED),
    Code(
        "CWG109", Verdict.LEAKED, "not closed by the new owner of detach()", origin=Origin.DETACHED
    ),
    Code("CWG110", Verdict.LEAKED, "a C extension does not close it", origin=Origin.NATIVE),
    Code("CWG101", Verdict.LEAKED, "the peer closed, the program did not"),
    Code(
        "CWG202", Verdict.DEAD, "never connected, not closed", connection=Connection.NEVER_CONNECTED
    ),
    Code("CWG201", Verdict.DEAD, "the connection failed or ended, the socket is open"),
    Code("CWG302", Verdict.DROPPED, "collected in a reference cycle", evidence=Evidence.COLLECTED),
    Code("CWG301", Verdict.DROPPED, "the last reference went away without close()"),
    Code("CWG401", Verdict.LINGERING, "close() was called, a file object keeps it open"),
    Code("CWG501", Verdict.INHERITED, "a copy inherited through fork() is not closed"),
    Code(
        "CWG902",
        Verdict.UNCLOSED,
        "a client or event loop is kept, stopped and not closed",
        evidence=Evidence.OWNER,
    ),
    Code("CWG903", Verdict.SURPLUS, "a new client for each call, all of them kept"),
    Code("CWG901", Verdict.UNCLOSED, "a client or event loop was collected without its close"),
    Code("CWG904", Verdict.CHECKED_OUT, "taken from a pool and not given back for long"),
    Code("CWG601", Verdict.CLOSED_ELSEWHERE, "the descriptor was closed and reused"),
    Code(
        SURPLUS_CLIENTS, Verdict.STALE_POOL, "more clients than needed, each idle", owner=_EACH_CALL
    ),
    Code("CWG701", Verdict.STALE_POOL, "an idle pooled connection was closed by the server"),
    Code("CWG702", Verdict.HALF_CLOSED, "the peer finished sending, the program has not"),
    Code("CWG703", Verdict.CLOSING, "the connection is closing"),
    Code("CWG707", Verdict.OPEN, "a response of a test or block is not closed", owner=_RESPONSE),
    Code("CWG706", Verdict.OPEN, "a client of a test or block is not closed", owner=_CLIENT),
    Code("CWG704", Verdict.OPEN, "opened in a test or block and still open"),
    Code("CWG709", Verdict.UNANSWERED, "the peer acknowledges nothing of what was sent"),
    Code("CWG708", Verdict.IDLE_OR_LEAKED, "seen from outside: an idle pool, or a few leaks"),
)

ALERT_CODES = {
    AlertKind.COUNT: "CWG801",
    AlertKind.AGE: "CWG802",
    AlertKind.GROWTH: "CWG803",
    AlertKind.CHURN: "CWG804",
    AlertKind.FD_LIMIT: "CWG805",
    AlertKind.FD_EXHAUSTED: "CWG806",
    AlertKind.POOL_EXHAUSTED: "CWG807",
}


@lru_cache(4096)
def cause_code(
    verdict: Verdict,
    origin: Origin,
    evidence: Evidence,
    connection: Connection,
    *,
    is_replaced: bool = False,
    owners: tuple[str, ...] = (),
) -> str:
    """The code of the cause of a finding.

    Args:
        verdict: The verdict on the socket.
        origin: How the descriptor came to be.
        evidence: What the verdict rests on.
        connection: What is left of its connection.
        is_replaced: Whether the same line has connected again since.
        owners: The objects of libraries that hold it, by which a library's hint was chosen.

    Example:
        >>> cause_code(Verdict.CLOSING, Origin.CREATED, Evidence.POLL, Connection.LIVE)
        'CWG703'
    """
    owner = _kind_of(owners)
    fitting = (
        row.name
        for row in CODES
        if row.fits(verdict, origin, evidence, connection, is_replaced=is_replaced, owner=owner)
    )
    return next(fitting, "")


def _kind_of(owners: tuple[str, ...]) -> str:
    """What kind of object holds a socket, by the names that hints have for holders."""
    if not owners:
        return ""
    # From outside nothing is known of libraries, and nothing of theirs is loaded.
    from closewait_guard._libraries import LOOP_WAKER, RESPONSES, RUNNING_CALL

    if LOOP_WAKER in owners:
        return ""
    if "traceback" in owners:
        return _EXCEPTION
    if RUNNING_CALL in owners:
        return _CALL
    if any(name.endswith(RESPONSES) for name in owners):
        return _RESPONSE
    if any(name.endswith((" for each call", " out of use")) for name in owners):
        return _EACH_CALL
    return _CLIENT
