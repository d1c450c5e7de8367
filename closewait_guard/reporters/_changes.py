"""Tell only what is new, got worse, or went away."""

from __future__ import annotations

from dataclasses import replace

from closewait_guard.model import Leak, Report, Reporter
from closewait_guard.reporters._wrapping import Wrapping, serial_of

__all__ = ["changes"]


def changes(reporter: Reporter) -> Reporter:
    """Hand on only what the reporter has not been told yet, and nothing if there is no such thing.

    A socket is told when it is first accused, when its verdict changes or its severity rises, and
    when the program has closed it after all. What is explained rather than accused comes along,
    but is no news by itself. What is left out is counted in `Report.omitted`. Of a report that
    the reporter has failed to take, its leaks are news again in the next.

    `every(60, changes(reporter))` loses nothing, while with `changes(every(60, reporter))` most
    news falls into the time between.

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
        news = {serial_of(leak): leak for leak in report.leaks if self._is_other(leak)}
        gone = tuple(each for each in report.closed if serial_of(each.leak) in self._told)
        if gone or report.alerts or any(map(self._is_news, news.values())):
            known = sum(leak.accused for leak in report.leaks if serial_of(leak) not in news)
            self._reporter(
                replace(
                    report,
                    leaks=tuple(news.values()),
                    closed=gone,
                    omitted=report.omitted + known,
                )
            )
            self._told |= news
        present = {serial_of(leak) for leak in report.leaks}
        self._told = {serial: leak for serial, leak in self._told.items() if serial in present}

    def _is_other(self, leak: Leak) -> bool:
        """Whether it is not as it was told, or better only in how bad it is."""
        told = self._told.get(serial_of(leak))
        if told is None:
            return True
        return told.verdict is not leak.verdict or told.severity.rank < leak.severity.rank

    def _is_news(self, leak: Leak) -> bool:
        told = self._told.get(serial_of(leak))
        return leak.accused or (told is not None and told.accused)
