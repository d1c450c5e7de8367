"""The sockets that were finalized while open: the youngest are remembered, all are counted."""

from __future__ import annotations

import socket
from collections import deque

from closewait_guard._remains import Remains
from closewait_guard._story import SOCK, Story
from closewait_guard._tally import Tally

__all__ = ["Drop", "Drops"]


class Drop:
    """A socket that was finalized while it was open, and the kernel's last word on it."""

    __slots__ = ("collected", "fd", "remains", "story")

    def __init__(self, story: Story, sock: socket.socket, fd: int) -> None:
        self.story = story
        self.fd = fd
        # The collector clears weak references before it finalizes; a last reference that goes
        # finalizes first.
        self.collected = story[SOCK]() is None
        self.remains = Remains(sock, fd)


class Drops:
    """Written to in finalizers: nothing here takes a lock, but for the count when it is read.

    Attributes:
        kept: The youngest.
    """

    def __init__(self, kept: int) -> None:
        self.kept: deque[Drop] = deque(maxlen=kept)
        self.tally = Tally()

    def add(self, story: Story, sock: socket.socket, fd: int) -> None:
        """Look at a dying socket for the last time."""
        self.kept.append(Drop(story, sock, fd))
        self.tally.count()

    def youngest(self) -> tuple[Drop, ...]:
        """Those that are remembered."""
        return tuple(self.kept.copy())

    def after_fork(self) -> None:
        """In the child: those before were the parent's affair."""
        self.kept.clear()
        self.tally.after_fork()
