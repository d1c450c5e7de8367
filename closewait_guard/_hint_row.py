"""One row of the table of hints, and for which sockets it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from closewait_guard.model import Connection, Evidence, Origin, Verdict

__all__ = ["Hint", "held"]


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
