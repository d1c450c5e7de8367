"""Tell only what is at least so bad."""

from __future__ import annotations

from dataclasses import replace

from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Report, Reporter, Severity
from closewait_guard.reporters._wrapping import Wrapping

__all__ = ["at_least"]


def at_least(severity: Severity | str, reporter: Reporter) -> Reporter:
    """Hand on only leaks and alerts of that severity or worse, and nothing if there are none.

    An alert that is resolved keeps the severity it had, so whoever was told of it is told of its
    end. A socket that closed after all is told to those who were told that it was leaked.

    Example:
        >>> from closewait_guard import reporters
        >>> at_least("critical", reporters.text())
        at_least(text.<locals>.text_reporter)
    """
    return _AtLeast(severity, reporter)


class _AtLeast(Wrapping):
    def __init__(self, severity: Severity | str, reporter: Reporter) -> None:
        super().__init__("at_least", reporter)
        try:
            self._rank = Severity(severity).rank
        except ValueError:
            known = ", ".join(Severity)
            raise ConfigurationError(
                f"at_least: severity must be one of {known}, not {severity!r}"
            ) from None

    def __call__(self, report: Report, /) -> None:
        leaks = tuple(leak for leak in report.leaks if self._matters(leak.severity))
        alerts = tuple(alert for alert in report.alerts if self._matters(alert.severity))
        closed = tuple(each for each in report.closed if self._matters(each.leak.severity))
        if leaks or alerts or closed:
            omitted = report.omitted + len(report.accused) - sum(leak.accused for leak in leaks)
            self._reporter(
                replace(report, leaks=leaks, alerts=alerts, closed=closed, omitted=omitted)
            )

    def _matters(self, severity: Severity) -> bool:
        return severity.rank >= self._rank
