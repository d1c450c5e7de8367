"""The sockets that were finalized while open: the youngest are remembered, all are counted."""

from __future__ import annotations

import socket
from collections import deque
from typing import NamedTuple

from closewait_guard._birth import SOCK, Story
from closewait_guard._probe import Endpoint, Probe, View, endpoint_of
from closewait_guard._tally import Tally

__all__ = ["Drop", "Drops"]


class Drop(NamedTuple):
    """A socket that was finalized while it was open, and the kernel's last word on it."""

    story: Story
    fd: int
    collected: bool
    endpoint: Endpoint
    view: View | None


class Drops:
    """Written to in finalizers: nothing here takes a lock, but for the count when it is read.

    Attributes:
        kept: The youngest.
    """

    def __init__(self, probe: Probe, kept: int) -> None:
        self._probe = probe
        self.kept: deque[Drop] = deque(maxlen=kept)
        self.tally = Tally()

    def add(self, story: Story, sock: socket.socket, fd: int) -> None:
        """Look at a dying socket for the last time."""
        # The collector clears weak references before it finalizes; a last reference that goes
        # finalizes first.
        collected = story[SOCK]() is None
        endpoint, view = endpoint_of(sock, fd), self._probe.look(sock, fd, 0)
        self.kept.append(Drop(story, fd, collected, endpoint, view))
        self.tally.count()

    def youngest(self) -> tuple[Drop, ...]:
        """Those that are remembered."""
        return tuple(self.kept.copy())

    def after_fork(self) -> None:
        """In the child: those before were the parent's affair."""
        self.kept.clear()
        self.tally.after_fork()
