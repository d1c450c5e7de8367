"""What to change in the program, by verdict and by how the descriptor came to be: data only."""

from __future__ import annotations

from functools import lru_cache

from closewait_guard.model import Evidence, Origin, Verdict

__all__ = ["hint_for"]

_ANY = None

# The first entry that fits is taken: from (verdict, origin, evidence) to a sentence.
_HINTS: tuple[tuple[Verdict, Origin | None, Evidence | None, str], ...] = (
    (
        Verdict.LEAKED,
        Origin.ACCEPTED,
        _ANY,
        "the handler of this connection must close it when recv() returns b'': use "
        "`with conn:` around the handler, error paths included",
    ),
    (
        Verdict.LEAKED,
        Origin.DUPLICATED,
        _ANY,
        "a duplicate has a descriptor of its own: close it too, or do not duplicate",
    ),
    (
        Verdict.LEAKED,
        Origin.DETACHED,
        _ANY,
        "the descriptor was handed over by detach(): whoever took it must close it, "
        "by close() of its new owner or os.close(fd)",
    ),
    (
        Verdict.LEAKED,
        Origin.NATIVE,
        _ANY,
        "its owner must call close() on it when reading returns 0 bytes, which says that the peer "
        "has closed",
    ),
    (
        Verdict.LEAKED,
        _ANY,
        _ANY,
        "close it where it is used up: `with` around the socket, response, session or client, "
        "or close() in a finally block, also when the response is not read to its end",
    ),
    (
        Verdict.DEAD,
        _ANY,
        _ANY,
        "the connection failed or ended, the descriptor is still taken: call close() in the "
        "error path, e.g. in an `except OSError` or a finally block",
    ),
    (
        Verdict.DROPPED,
        _ANY,
        Evidence.COLLECTED,
        "it was kept in a reference cycle until the garbage collector ran, often by an "
        "exception's traceback: close() it before the last variable goes",
    ),
    (
        Verdict.DROPPED,
        _ANY,
        _ANY,
        "the last variable that held it went without a close(): use `with`, or close() in a "
        "finally block",
    ),
    (
        Verdict.LINGERING,
        _ANY,
        _ANY,
        "close() was called, but a file object from makefile() keeps the descriptor: close that "
        "too, or the response that reads from it",
    ),
    (
        Verdict.INHERITED,
        _ANY,
        _ANY,
        "this copy came over fork(): close it in the child, or open it after the fork",
    ),
    (
        Verdict.HALF_CLOSED,
        _ANY,
        _ANY,
        "the peer has closed its side and we are still sending: nothing to do unless it stays",
    ),
    (
        Verdict.CLOSING,
        _ANY,
        _ANY,
        "the connection is ending at this moment: nothing to do unless it stays",
    ),
    (
        Verdict.OPEN,
        _ANY,
        _ANY,
        "it was opened here and is still open: close() it, or use `with`",
    ),
)


@lru_cache(None)
def hint_for(verdict: Verdict, origin: Origin, evidence: Evidence) -> str:
    """One sentence that says what to change."""
    for wanted, wanted_origin, wanted_evidence, text in _HINTS:
        if (
            wanted is verdict
            and wanted_origin in (_ANY, origin)
            and wanted_evidence in (_ANY, evidence)
        ):
            return text
    return ""
