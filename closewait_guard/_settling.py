"""Give sockets that are about to close the time to do so, before anybody is accused."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from closewait_guard._clock import now
from closewait_guard._judgements import Verdict

if TYPE_CHECKING:
    from closewait_guard.model import Report

__all__ = ["Settling"]

_FIRST_WAIT = 0.001


class Settling:
    """Yields how long to wait before each further look; `report` is the last look's.

    The waits double, and end with the grace time, as the clock and as their sum has it. Garbage is
    collected once, and neither happens when nothing is suspect.

    Args:
        look: Reports the suspects.
        grace: Seconds that the waits may take together.
    """

    def __init__(self, look: Callable[[], Report], grace: float) -> None:
        self._look = look
        self._left = grace
        self._deadline = now() + grace
        self.report: Report

    def __iter__(self) -> Generator[float, None, None]:
        wait, collected = _FIRST_WAIT, False
        while not self._settled():
            left = min(self._left, self._deadline - now())
            if left <= 0 and collected:
                return
            if left > 0:
                yield min(wait, left)
                self._left -= wait
            if not collected:
                # After one short wait: what closes by itself never costs a collection.
                gc.collect()
                collected = True
            wait *= 2

    def _settled(self) -> bool:
        """Whether waiting can change nothing: all is closed, but for what was dropped."""
        self.report = self._look()
        return all(leak.verdict is Verdict.DROPPED for leak in self.report.leaks)
