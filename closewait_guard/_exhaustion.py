"""When no descriptor is left for a socket: count it, and have it reported at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from closewait_guard._clock import now
from closewait_guard._daemons import allows_daemons
from closewait_guard._tally import Tally

__all__ = ["Exhaustion"]

_SECONDS_BETWEEN = 60.0


class Exhaustion:
    """Called in the middle of the program's own failing call: quick, and takes no descriptor.

    Args:
        report: What to do at once, in a thread of its own; once a minute at most.
        clock: Seconds that never jump.
    """

    def __init__(self, report: Callable[[], object], clock: Callable[[], float] = now) -> None:
        self._report = report
        self._clock = clock
        self._tally = Tally()
        self._last: float | None = None

    @property
    def times(self) -> int:
        """How often there was none, so far."""
        return self._tally.total()

    def __call__(self) -> None:
        self._tally.count()
        at = self._clock()
        is_due = self._last is None or at - self._last >= _SECONDS_BETWEEN
        # A thread that is started while the interpreter ends never runs, and is waited for.
        if is_due and not sys.is_finalizing() and allows_daemons():
            self._last = at
            # Without a thread to be had, the count is in the next report.
            with suppress(RuntimeError):
                threading.Thread(
                    target=self._report, name="closewait-guard-exhausted", daemon=True
                ).start()

    def after_fork(self) -> None:
        """In the child."""
        self._tally.after_fork()
