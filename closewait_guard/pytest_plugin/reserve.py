"""Two descriptors put aside, for what has to be opened when a test has taken all others."""

from __future__ import annotations

import os
from contextlib import suppress

from closewait_guard._descriptor import inode_of

__all__ = ["Reserve"]


class Reserve:
    """Both ends of a pipe. What looks and tells is loaded late, and reads lines of code."""

    def __init__(self) -> None:
        self._ends: tuple[int, ...] = ()
        self._inode: int | None = None

    def lay_up(self) -> None:
        """Put it aside, if that has not been done and there is room."""
        if not self._ends:
            with suppress(OSError):
                self._ends = os.pipe()
                self._inode = inode_of(self._ends[0])

    def give_up(self) -> None:
        """Let it be used."""
        ends, self._ends = self._ends, ()
        for end in ends:
            # A test may have closed all there was, and opened what has the number now.
            if inode_of(end) == self._inode:
                os.close(end)
