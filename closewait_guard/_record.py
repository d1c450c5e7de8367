"""How a socket was opened: a record, its creation stack, and which line of that to show. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from closewait_guard._cpython import refuse_changes
from closewait_guard._enums import FrameKind, Origin, Scalar

__all__ = [
    "Frame",
    "SocketRecord",
]


@refuse_changes
@dataclass(frozen=True, slots=True)
class Frame:
    """One call of a creation stack, with its source line if that could be read.

    Attributes:
        is_awaiting: It waits for the task of the calls before it, instead of making them.
    """

    filename: str
    lineno: int
    function: str
    module: str
    kind: FrameKind = FrameKind.USER
    source: str | None = None
    is_awaiting: bool = False

    @property
    def place(self) -> str:
        """The file and line."""
        return f"{self.filename}:{self.lineno}"

    @property
    def call(self) -> str:
        """The place and the function."""
        return f"{self.place} in {self.function}()".replace(">()", ">")


@refuse_changes
@dataclass(frozen=True, slots=True)
class SocketRecord:
    """How a socket was opened.

    Attributes:
        serial: The number of the socket among those of one guard.
        opened_at: Seconds since the epoch; None for a socket older than the guard.
        context: What `Settings.context` returned then. Treat it as read-only.
        parent: The record this descriptor had before (TLS, dup, detach, fork), or the listener's.
        stack: The innermost call first; empty with depth 0 and for adopted sockets.
    """

    serial: int
    pid: int
    opened_at: float | None
    thread: str
    task: str | None
    labels: tuple[str, ...]
    context: Mapping[str, Scalar]
    origin: Origin
    parent: SocketRecord | None
    stack: tuple[Frame, ...]

    @property
    def opener(self) -> SocketRecord:
        """The record of the call that opened the descriptor, before any TLS wrapping or fork."""
        record = self
        while record.origin in _SAME_DESCRIPTOR and record.parent and record.parent.stack:
            record = record.parent
        return record

    @property
    def blamed(self) -> SocketRecord:
        """The record whose code opened it: the opener's, or the listener's.

        A server of a library, or an event loop, accepts for the program: no line of the program
        called `accept()`, so the line that opened the listener says more.
        """
        opener = self.opener
        if opener.origin is Origin.ACCEPTED and opener.parent and not _user_accepts(opener.stack):
            return opener.parent.blamed if opener.parent.stack else opener
        return opener

    @property
    def site(self) -> Frame | None:
        """The line to show: the innermost user frame, else the innermost outside the stdlib.

        Where a task of the standard library opened it for no call of others, the innermost.
        """
        kinds = (FrameKind.USER, FrameKind.LIBRARY)
        for kind in kinds if self.task is None else (*kinds, FrameKind.STDLIB):
            for frame in self.blamed.stack:
                if frame.kind is kind:
                    return frame
        return None


_SAME_DESCRIPTOR = frozenset({Origin.WRAPPED, Origin.DETACHED, Origin.INHERITED})


def _user_accepts(stack: tuple[Frame, ...]) -> bool:
    """Whether a line of the program called `accept()`, directly or through a library's wrapper.

    What runs a whole server has another name, and accepts out of the program's sight.
    """
    callers = [frame for frame in stack if frame.module not in ("socket", "ssl")]
    called = ""
    for number, frame in enumerate(callers):
        if frame.kind is FrameKind.USER:
            return not number or "accept" in f"{called} {frame.source}"
        called = frame.function.rpartition(".")[2]
    return False
