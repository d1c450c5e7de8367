"""A count that finalizers and signal handlers may raise, because raising it takes no lock."""

from __future__ import annotations

import itertools
import threading

__all__ = ["Tally"]


class Tally:
    """Numbers events. `count()` gives each event its number; only reading takes a lock."""

    def __init__(self) -> None:
        self.count = itertools.count(1).__next__
        self._uncounted = 0
        self._reading = threading.RLock()

    def mark(self) -> int:
        """A number above that of every event so far, and below that of the next."""
        with self._reading:
            self._uncounted += 1
            return self.count()

    def total(self) -> int:
        """How many events there have been, in this process."""
        with self._reading:
            return self.mark() - self._uncounted

    def after_fork(self) -> None:
        """In the child: begin at nought again, though the numbers go on.

        A lock that another thread held at the fork would never be released.
        """
        self._reading = threading.RLock()
        self._uncounted = self.count()
