"""Tell only what is at least so bad.

Tell only what is new, got worse, or went away.

Tell at most once in a while.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from closewait_guard._clock import now
from closewait_guard._config import shown
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import (
    Alert,
    AlertKind,
    AlertStatus,
    ClosedLate,
    Finding,
    Report,
    Reporter,
    Severity,
)
from closewait_guard.reporters.base import Wrapping, serial_of

__all__ = [
    "at_least",
    "changes",
    "every",
]


def at_least(severity: Severity | str, reporter: Reporter) -> Reporter:
    """Hand on only leaks and alerts of that severity or worse, and nothing if there are none.

    Whoever was told of an alert is told when it gets better or ends, and whoever was told of a
    leaked socket, when it closes after all.

    Example:
        >>> from closewait_guard import reporters
        >>> at_least("critical", reporters.text())
        at_least(text.<locals>.text_reporter)
    """
    return _AtLeast(severity, reporter)


class _AtLeast(Wrapping):
    def __init__(self, severity: Severity | str, reporter: Reporter) -> None:
        super().__init__("at_least", reporter)
        self._alerts: set[object] = set()
        self._sockets: set[int] = set()
        try:
            self._rank = Severity(severity).rank
        except ValueError:
            known = ", ".join(Severity)
            raise ConfigurationError(
                f"at_least: severity must be one of {known}, not {severity!r}"
            ) from None

    def __call__(self, report: Report, /) -> None:
        leaks = tuple(leak for leak in report.findings if self._matters(leak.severity))
        alerts = tuple(alert for alert in report.alerts if self._is_told(alert))
        closed = tuple(
            each for each in report.closed_late if serial_of(each.finding) in self._sockets
        )
        present = {serial_of(leak) for leak in report.findings}
        self._sockets = {serial_of(leak) for leak in leaks} | (self._sockets & present)
        if leaks or alerts or closed:
            omitted = report.omitted + len(report.leaks) - sum(leak.is_leak for leak in leaks)
            self._reporter(
                replace(report, findings=leaks, alerts=alerts, closed_late=closed, omitted=omitted)
            )

    def _is_told(self, alert: Alert) -> bool:
        is_of_site = alert.kind in (AlertKind.GROWTH, AlertKind.CHURN)
        key = (alert.kind, alert.data.get("site") if is_of_site else None)
        was_told, matters = key in self._alerts, self._matters(alert.severity)
        if matters and alert.status is not AlertStatus.RESOLVED:
            self._alerts.add(key)
        else:
            self._alerts.discard(key)
        return was_told or matters

    def _matters(self, severity: Severity) -> bool:
        return severity.rank >= self._rank


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
        self._told: dict[int, Finding] = {}

    def __call__(self, report: Report, /) -> None:
        news = {serial_of(leak): leak for leak in report.findings if self._is_other(leak)}
        gone = tuple(each for each in report.closed_late if serial_of(each.finding) in self._told)
        if gone or report.alerts or any(map(self._is_news, news.values())):
            known = sum(leak.is_leak for leak in report.findings if serial_of(leak) not in news)
            self._reporter(
                replace(
                    report,
                    findings=tuple(news.values()),
                    closed_late=gone,
                    omitted=report.omitted + known,
                )
            )
            self._told |= news
        present = {serial_of(leak) for leak in report.findings}
        self._told = {serial: leak for serial, leak in self._told.items() if serial in present}

    def _is_other(self, leak: Finding) -> bool:
        """Whether it is not as it was told, or better only in how bad it is."""
        told = self._told.get(serial_of(leak))
        if told is None:
            return True
        return told.verdict is not leak.verdict or told.severity.rank < leak.severity.rank

    def _is_news(self, leak: Finding) -> bool:
        told = self._told.get(serial_of(leak))
        return leak.is_leak or (told is not None and told.is_leak)


_MOST_WAITING = 1000


def every(seconds: float, reporter: Reporter, *, clock: Callable[[], float] = now) -> Reporter:
    """Hand on the first report, and then one in so many seconds, whoever asks for more.

    News is not lost: alerts, and sockets that closed late, wait for the next report that the
    reporter takes; the last thousand of each.

    Example:
        >>> from closewait_guard import reporters
        >>> every(3600, reporters.text())
        every(text.<locals>.text_reporter)
    """
    return _Every(seconds, reporter, clock)


class _Every(Wrapping):
    def __init__(self, seconds: float, reporter: Reporter, clock: Callable[[], float]) -> None:
        super().__init__("every", reporter)
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not is_number or not 0 <= seconds < math.inf:
            raise ConfigurationError(
                f"every: seconds must be a number, zero or more, not {shown(seconds)}"
            )
        self._seconds = seconds
        self._clock = clock
        self._next = -math.inf
        self._alerts: tuple[Alert, ...] = ()
        self._closed: tuple[ClosedLate, ...] = ()

    def __call__(self, report: Report, /) -> None:
        self._alerts = (*self._alerts, *report.alerts)[-_MOST_WAITING:]
        self._closed = (*self._closed, *report.closed_late)[-_MOST_WAITING:]
        at = self._clock()
        if at >= self._next:
            self._next = at + self._seconds
            self._reporter(replace(report, alerts=self._alerts, closed_late=self._closed))
            # Only now, because it may have failed.
            self._alerts = self._closed = ()
