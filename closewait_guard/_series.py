"""The series that the reports of a guard form: alerts, and what was closed since the last."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from closewait_guard._capture import Registry
from closewait_guard._inspect import SiteCount, count_by_site
from closewait_guard._judge import AlertState, SeriesPoint, update_alerts
from closewait_guard.model import Report
from closewait_guard.settings import Settings

__all__ = [
    "ReportSeries",
]


class ReportSeries:
    """Adds to each report of a series its alerts, and what was closed late since the last."""

    def __init__(self, registry: Registry, settings: Settings, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._state = AlertState()
        self._size = (0, 0)
        self._open_by_site: dict[str, SiteCount] = {}
        # One for each of the last reports: the oldest lies half a window back.
        self._marks: deque[int] = deque(maxlen=max(1, settings.growth_window // 2))
        # When the scan of the latest report began.
        self._latest = -math.inf
        self._one_at_a_time = threading.RLock()

    def advance(self, report: Report, began: float, times_exhausted: int) -> Report:
        """The report as the next of the series.

        One whose scan began before that of the latest has no news: the latest has all of it.
        """
        with self._one_at_a_time:
            if began < self._latest:
                return report
            self._latest = began
            still_open = frozenset(
                serial
                for serial, (leak, _) in self._state.leaks.items()
                if self._registry.is_open(leak.observation.fd, serial)
            )
            point = SeriesPoint(
                self._clock(), report, self._count_by_site(report), times_exhausted, still_open
            )
            self._state, alerts, closed_late = update_alerts(self._state, point, self._settings)
            return replace(report, alerts=alerts, closed_late=closed_late)

    def reported_leaks(self) -> frozenset[int]:
        """The serials of the leaks that the latest report has."""
        return frozenset(self._state.leaks)

    def after_fork(self) -> None:
        """In the child: the leaks were the parent's, and the lock may never be released."""
        self._state = AlertState()
        self._marks.clear()
        self._one_at_a_time = threading.RLock()

    def _count_by_site(self, report: Report) -> dict[str, SiteCount]:
        if not self._settings.growth_window:
            return {}
        self._marks.append(self._registry.mark())
        # Counting touches every socket; where none was opened or closed there is nothing new.
        size = report.coverage.opened, report.open_sockets
        if size != self._size:
            self._size = size
            registry = self._registry
            self._open_by_site = count_by_site(registry.last_open(), self._marks[0], registry.pid)
        return self._open_by_site
