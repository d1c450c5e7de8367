"""Two descriptors put aside, for what has to be opened when a test has taken all others."""

from __future__ import annotations

from contextlib import suppress

from closewait_guard._descriptor import OwnedDescriptor, owned_pipe

__all__ = ["Reserve"]


class Reserve:
    """Both ends of a pipe. What looks and tells is loaded late, and reads lines of code."""

    def __init__(self) -> None:
        self._ends: tuple[OwnedDescriptor, ...] = ()

    def lay_up(self) -> None:
        """Put it aside, if that has not been done and there is room."""
        if not self._ends:
            with suppress(OSError):
                self._ends = owned_pipe()

    def give_up(self) -> None:
        """Let it be used."""
        ends, self._ends = self._ends, ()
        for end in ends:
            end.close()
