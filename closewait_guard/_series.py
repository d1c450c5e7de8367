"""The series that the reports of a guard form: alerts, what was closed since, and the numbers."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from closewait_guard._capture import ORIGIN, PID, Registry
from closewait_guard._enums import Origin
from closewait_guard._holders import PoolCounter
from closewait_guard._inspect import SiteCount, count_by_site
from closewait_guard._judge import AlertState, SeriesPoint, fastest_growth, update_alerts
from closewait_guard._numbers import Numbers, SeriesFacts, numbers_of
from closewait_guard._redact import Redaction
from closewait_guard.model import Report
from closewait_guard.settings import Settings

__all__ = [
    "ReportSeries",
    "after_each_report",
]


_listeners: list[Callable[[], None]] = []


def after_each_report(call: Callable[[], None]) -> Callable[[], None]:
    """Call a function after each report of any series, in its thread; returns what ends that."""
    _listeners.append(call)

    def stop() -> None:
        with suppress(ValueError):
            _listeners.remove(call)

    return stop


class ReportSeries:
    """Adds to each report of a series its alerts, and what was closed late since the last.

    Attributes:
        latest: The latest report as it was delivered, and the processor time of its scan.
    """

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
        self._redact = Redaction(settings.redact).text
        self._pools = PoolCounter()
        self.latest: tuple[Report, float] | None = None
        self._numbers: tuple[Report, Numbers] | None = None
        self._closed = 0

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

    def keep(self, report: Report, began: float, scan_seconds: float) -> Report:
        """Keep the finished report, unless one is there whose scan began later."""
        if began >= self._latest:
            self.latest = report, scan_seconds
        for call in _listeners.copy():
            with suppress(Exception):
                call()
        return report

    def numbers(self) -> Numbers | None:
        """Those of the latest report, found once; None before the first."""
        latest, known = self.latest, self._numbers
        if latest is None:
            return None
        if known is None or known[0] is not latest[0]:
            known = self._numbers = latest[0], self.numbers_of(*latest)
        return known[1]

    def numbers_of(self, report: Report, scan_seconds: float) -> Numbers:
        """The numbers of a report, with the growth that the series shows, and the pools now."""
        growth, time_left = fastest_growth(self._state.leaked, report)
        owners = self._registry.owners
        taken = [] if owners is None else owners.checkouts.open_checkouts()
        pools = tuple(
            each._replace(name=self._redact(each.name)) for each in self._pools.count(taken)
        )
        facts = SeriesFacts(self._count_closed(report), growth, time_left, scan_seconds, pools)
        return numbers_of(report, facts)

    def _count_closed(self, report: Report) -> int:
        """How many of those opened here are closed. It never falls, as a total must not."""
        pid, opened = self._registry.pid, report.coverage.opened
        still_open = sum(
            each[PID] == pid and each[ORIGIN] is not Origin.ADOPTED
            for each in self._registry.last_open()
        )
        self._closed = max(self._closed, opened - still_open)
        return self._closed

    def reported_leaks(self) -> frozenset[int]:
        """The serials of the leaks that the latest report has."""
        return frozenset(self._state.leaks)

    def after_fork(self) -> None:
        """In the child: the leaks were the parent's, and the lock may never be released."""
        self._state = AlertState()
        self._marks.clear()
        self._one_at_a_time = threading.RLock()
        self.latest = self._numbers = None
        self._closed = 0

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
