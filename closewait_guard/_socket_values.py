"""The values of one socket: its creation stack, its record, and what the kernel shows of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from closewait_guard._origin import Origin
from closewait_guard._vocabulary import Connection, Evidence, FrameKind, Scalar, State

__all__ = ["UNKNOWN_FAMILY", "Frame", "Observation", "SocketRecord"]


@dataclass(frozen=True, slots=True)
class Frame:
    """One call of a creation stack, with the source line where it could be read."""

    filename: str
    lineno: int
    function: str
    module: str
    kind: FrameKind = FrameKind.USER
    source: str | None = None

    @property
    def place(self) -> str:
        """The file and the line."""
        return f"{self.filename}:{self.lineno}"

    @property
    def call(self) -> str:
        """The place, and the function that stands there."""
        return f"{self.place} in {self.function}()".replace(">()", ">")


@dataclass(frozen=True, slots=True)
class SocketRecord:
    """How a socket was born.

    Attributes:
        serial: Counts the births of one guard.
        born_at: Seconds since the epoch; None for a socket older than the guard.
        context: What `Settings.context` said at birth; read it, do not change it.
        parent: The record this descriptor had before (TLS, dup, detach, fork), or the listener's.
        stack: The innermost call first; empty with depth 0 and for adopted sockets.
    """

    serial: int
    pid: int
    born_at: float | None
    thread: str
    task: str | None
    labels: tuple[str, ...]
    context: Mapping[str, Scalar]
    origin: Origin
    parent: SocketRecord | None
    stack: tuple[Frame, ...]

    @property
    def birth(self) -> SocketRecord:
        """The record whose stack tells who opened the descriptor: through TLS and fork."""
        record = self
        while record.origin in _SAME_DESCRIPTOR and record.parent and record.parent.stack:
            record = record.parent
        return record

    @property
    def culprit(self) -> SocketRecord:
        """The record whose code is to blame: the birth's, or the listener's.

        A server of a library, or an event loop, accepts for the program: no line of the program
        called `accept()`, so its listener's birth tells more.
        """
        birth = self.birth
        if birth.origin is Origin.ACCEPTED and birth.parent and not _called_by_user(birth.stack):
            return birth.parent.culprit if birth.parent.stack else birth
        return birth

    @property
    def site(self) -> Frame | None:
        """The line to look at: the innermost user frame, else the innermost outside the stdlib."""
        for kind in (FrameKind.USER, FrameKind.LIBRARY):
            for frame in self.culprit.stack:
                if frame.kind is kind:
                    return frame
        return None


_SAME_DESCRIPTOR = frozenset({Origin.WRAPPED, Origin.DETACHED, Origin.INHERITED})


def _called_by_user(stack: tuple[Frame, ...]) -> bool:
    """Whether the program itself called the standard library's socket code."""
    callers = (frame.kind for frame in stack if frame.module not in ("socket", "ssl"))
    return next(callers, None) is FrameKind.USER


# Of a socket that could not be looked at.
UNKNOWN_FAMILY = "unknown"


@dataclass(frozen=True, slots=True)
class Observation:
    """What one look at the kernel showed of one socket.

    Attributes:
        peer_closed_for: Seconds since the peer's FIN; None when it has not closed, or nobody knows.
        unread: Bytes that wait to be read; None where the platform does not say.
        close_called: The program called `close()`, yet a file object keeps the descriptor.
        connection: What is left of the connection.
        suspect_for: For how long the connection has been ended, or `close()` been called, without
            any sign of life; None while nothing is wrong.
        unsent: Bytes or segments that the peer has not acknowledged yet.
        in_use: A thread is reading from the file object of a closed socket at this moment.
    """

    record: SocketRecord
    fd: int
    inode: int | None
    family: str
    type: str
    local: str | None
    peer: str | None
    state: State
    evidence: Evidence
    peer_closed_for: float | None
    unread: int | None
    last_sent_for: float | None
    last_received_for: float | None
    tls: bool
    close_called: bool
    connection: Connection = Connection.LIVE
    suspect_for: float | None = None
    unsent: int | None = None
    in_use: bool = False

    @property
    def useless_for(self) -> float:
        """Seconds since the peer closed, or for which nobody has done anything about it."""
        return max(self.peer_closed_for or 0.0, self.suspect_for or 0.0)

    @property
    def is_described(self) -> bool:
        """Whether looking at it has succeeded; of any other, only where it was born is known."""
        return self.family != UNKNOWN_FAMILY
