"""How long something may take, in processor time and in time that passes."""

from __future__ import annotations

import time

from closewait_guard._clock import now

__all__ = ["TimeLimit"]

# Where others use the processor too, so many times as long may pass.
_WAITING = 10


class TimeLimit:
    """Begins at once, for the thread that makes it.

    Args:
        seconds: Of processor time.

    Attributes:
        end: When it is over for certain, by `now()`.
    """

    def __init__(self, seconds: float) -> None:
        self._processor = time.thread_time() + seconds
        self.end = now() + seconds * _WAITING

    def is_over(self) -> bool:
        """Whether no time is left."""
        return time.thread_time() > self._processor or now() > self.end

    def part(self, share: float) -> TimeLimit:
        """A limit of a share of what is left."""
        return TimeLimit(max(0.0, self._processor - time.thread_time()) * share)
