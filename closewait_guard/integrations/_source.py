"""Where metrics come from: the latest report of the guard that makes reports."""

from __future__ import annotations

from typing import NamedTuple

from closewait_guard._api import installed_guards
from closewait_guard._clock import thread_time
from closewait_guard._config import require_number, whole_number_parser
from closewait_guard._guard import Guard
from closewait_guard._monitor import is_monitored
from closewait_guard._numbers import Numbers, with_fewer_sites

__all__ = [
    "MOST_SITES",
    "NumberSource",
]


MOST_SITES = 20


class NumberSource(NamedTuple):
    """What to read.

    Attributes:
        guard: Whose reports; the process-wide guard's if None.
        scan: Make a report for each reading, rather than take the latest of the series.
        sites: How many leaking lines are shown by themselves, the worst first.
    """

    guard: Guard | None = None
    scan: bool = False
    sites: int = MOST_SITES

    @classmethod
    def of(cls, guard: Guard | None, *, scan: bool, sites: int) -> NumberSource:
        """One whose arguments have been checked.

        Raises:
            ConfigurationError: The number of sites is none.
        """
        parse = whole_number_parser(
            "a whole number from 0 to 1,000", lambda each: 0 <= each <= 1000
        )
        return cls(guard, scan, require_number(parse, sites, "sites"))

    def find_guard(self) -> Guard | None:
        """The guard that has made a report, or else has a monitor that will; None without one."""
        wanted = installed_guards() if self.guard is None else (self.guard,)
        guards = [each for each in wanted if each.installed]
        for each in guards:
            # What scans may not be loaded yet.
            if each._loaded is not None and each._loaded.series.latest is not None:
                return each
        return next((each for each in guards if self.scan or is_monitored(each)), None)

    def read(self) -> Numbers | None:
        """The numbers, none of them before the first report; None if no guard reports.

        What goes wrong is not for those who read metrics to bear: they get nothing.
        """
        try:
            guard = self.find_guard()
            if guard is None:
                return None
            return with_fewer_sites(self._read(guard), self.sites)
        except Exception:
            return None

    def _read(self, guard: Guard) -> Numbers:
        series = guard._pipeline.series
        if not self.scan:
            return series.numbers() or {}
        before = thread_time()
        report = guard.scan()
        return series.numbers_of(report, thread_time() - before)
