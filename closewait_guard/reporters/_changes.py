"""Tell only what is new, got worse, or went away."""

from __future__ import annotations

from dataclasses import replace

from closewait_guard.model import Leak, Report, Reporter
from closewait_guard.reporters._wrapping import Wrapping

__all__ = ["changes"]


def changes(reporter: Reporter) -> Reporter:
    """Hand on only what the reporter has not been told yet, and nothing if there is no such thing.

    A socket is told when it is first a suspect, when its verdict changes or its severity rises,
    and when the program has closed it after all. What is left out is counted in `Report.omitted`.

    Example:
        >>> from closewait_guard import Guard
        >>> from closewait_guard.testing import CapturingReporter
        >>> told = CapturingReporter()
        >>> with Guard(reporters=[changes(told)]) as guard:
        ...     _ = guard.report()
        >>> told.reports
        []
    """
    return _Changes("changes", reporter)


class _Changes(Wrapping):
    def __init__(self, name: str, reporter: Reporter) -> None:
        super().__init__(name, reporter)
        self._told: dict[int, Leak] = {}

    def __call__(self, report: Report, /) -> None:
        news = tuple(leak for leak in report.leaks if self._is_news(leak))
        gone = tuple(each for each in report.closed if _serial(each.leak) in self._told)
        self._told = {_serial(leak): leak for leak in report.leaks}
        if news or gone or report.alerts:
            fresh = set(map(id, news))
            known = sum(leak.accused for leak in report.leaks if id(leak) not in fresh)
            omitted = report.omitted + known
            self._reporter(replace(report, leaks=news, closed=gone, omitted=omitted))

    def _is_news(self, leak: Leak) -> bool:
        told = self._told.get(_serial(leak))
        if told is None:
            return True
        return told.verdict is not leak.verdict or told.severity.rank < leak.severity.rank


def _serial(leak: Leak) -> int:
    return leak.observation.record.serial
