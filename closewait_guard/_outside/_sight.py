"""What one look at a process from outside showed: values that every platform fills in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from closewait_guard._outside._process import Process
from closewait_guard._probe import Endpoint, View

__all__ = ["Copy", "Descriptor", "Everything", "Looker", "Refusal", "Sight", "Stray"]


class Descriptor(NamedTuple):
    """A descriptor that is a socket.

    Attributes:
        accepted: Its address is that of a listener, so that it must have come from one.
    """

    fd: int
    endpoint: Endpoint
    view: View
    accepted: bool


class Copy(NamedTuple):
    """The same socket, elsewhere."""

    pid: int
    program: str
    fd: int


class Sight(NamedTuple):
    """One process.

    Attributes:
        states: How many sockets are in each TCP state; other sockets by their protocol.
        ended: The TCP sockets whose connection is no more.
        others: The rest, where they were asked for.
        copies: By inode, all who have the same socket open, where that is more than one.
        backlog: Connections that the peer has closed before anybody accepted them, by address.
        uncertain_backlog: The same, where another process listens at that address, too.
        dated: The kernel said when the peers have closed.
    """

    process: Process
    states: Mapping[str, int]
    ended: Sequence[Descriptor]
    others: Sequence[Descriptor]
    copies: Mapping[int, Sequence[Copy]]
    backlog: Mapping[str, int]
    uncertain_backlog: Mapping[str, int]
    dated: bool


class Stray(NamedTuple):
    """A socket in CLOSE_WAIT whose process may not be seen."""

    uid: int
    descriptor: Descriptor


class Refusal(NamedTuple):
    """A process that may not be looked into, or is none.

    Attributes:
        why: What keeps it from being looked into, if that is not a lack of rights.
        is_a_loss: It may have sockets that nobody has told.
    """

    pid: int
    program: str
    uid: int | None
    exists: bool
    why: str = ""
    is_a_loss: bool = True


class Everything(NamedTuple):
    """All that one look showed.

    Attributes:
        at: The monotonic time when the kernel said how long ago everything was.
        hides: There may be processes of other users, which the platform does not even list.
    """

    at: float
    sights: Sequence[Sight]
    refused: Sequence[Refusal]
    strays: Sequence[Stray]
    hides: bool = False


class Looker(Protocol):
    """One platform's way to look at processes."""

    def look(self, pids: Sequence[int] | None, /, *, everything: bool) -> Everything:
        """Look at some processes, or at all.

        Args:
            pids: Their numbers; None for all that there are.
            everything: Describe the healthy sockets too.
        """

    def descendants(self, pids: Sequence[int], /) -> list[int]:
        """The processes, with all those that they have started, and so on."""
