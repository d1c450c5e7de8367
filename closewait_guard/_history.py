"""The series of a guard's reports: what there is to tell of each beside what a scan shows."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from closewait_guard._population import Population, populations
from closewait_guard._registry import Registry
from closewait_guard._trend import Moment, Trend, advanced
from closewait_guard.model import Report
from closewait_guard.settings import Settings

__all__ = ["History"]


class History:
    """Remembers the trend, and adds to each report its alerts and what was closed after all."""

    def __init__(self, registry: Registry, settings: Settings, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._trend = Trend()
        self._size = (0, 0)
        self._open_by_site: dict[str, Population] = {}
        # One for each of the last reports: the oldest lies half a window back.
        self._marks: deque[int] = deque(maxlen=max(1, settings.growth_window // 2))
        # When the scan of the latest report began.
        self._latest = -math.inf
        self._one_at_a_time = threading.RLock()

    def continued(self, report: Report, began: float, times_exhausted: int) -> Report:
        """The report as the next of the series.

        One whose scan began before that of the latest tells no news: all is in that one.
        """
        with self._one_at_a_time:
            if began < self._latest:
                return replace(report, alerts=())
            self._latest = began
            still_open = frozenset(
                serial
                for serial, (leak, _) in self._trend.accused.items()
                if self._registry.is_open(leak.observation.fd, serial)
            )
            moment = Moment(
                self._clock(), report, self._populations(report), times_exhausted, still_open
            )
            self._trend, alerts, closed = advanced(self._trend, moment, self._settings)
            return replace(report, alerts=alerts, closed=closed)

    def after_fork(self) -> None:
        """In the child: what was accused is the parent's, and its lock may never be released."""
        self._trend = Trend()
        self._marks.clear()
        self._one_at_a_time = threading.RLock()

    def _populations(self, report: Report) -> dict[str, Population]:
        if not self._settings.growth_window:
            return {}
        self._marks.append(self._registry.mark())
        # Counting touches every socket; where none was born or closed there is nothing new.
        size = report.coverage.births, report.open_sockets
        if size != self._size:
            self._size = size
            registry = self._registry
            self._open_by_site = populations(registry.lately_open(), self._marks[0], registry.pid)
        return self._open_by_site
