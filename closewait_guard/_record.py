"""How a socket was opened: a record, its creation stack, and which line of that to show. Pure.

Also what has sockets, and is meant to be closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from closewait_guard._cpython import refuse_changes
from closewait_guard._enums import FrameKind, Origin, Scalar

__all__ = [
    "Frame",
    "OpenAtEnd",
    "SocketOwner",
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
class SocketOwner:
    """An object that has connections and was meant to be closed: a session, a client, a loop.

    Attributes:
        name: What its users call it, such as `aiohttp.ClientSession`.
        sockets: How many it had when it was seen last.
        peers: To which addresses, each once.
        is_surplus: It can be used and closed, but its line has made more than the program needs.
        descriptors: How many others it had, such as pipes, by `DescriptorKind`.
    """

    name: str
    sockets: int
    peers: tuple[str, ...]
    is_surplus: bool = False
    descriptors: Mapping[str, int] = field(default_factory=dict)


@refuse_changes
@dataclass(frozen=True, slots=True)
class OpenAtEnd:
    """Objects that have connections, of one kind and line, that were open as the process ended.

    Attributes:
        name: What their users call one, such as `httpx.Client`.
        count: How many there were.
        place: The line and function that made them; empty if that is unknown or not one place.
        processes: In how many processes: more than one in a report of several.
    """

    name: str
    count: int
    place: str
    processes: int = 1


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
