"""Tell only what is at least so bad."""

from __future__ import annotations

from dataclasses import replace

from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Alert, AlertKind, AlertStatus, Report, Reporter, Severity
from closewait_guard.reporters._wrapping import Wrapping, serial_of

__all__ = ["at_least"]


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
        leaks = tuple(leak for leak in report.leaks if self._matters(leak.severity))
        alerts = tuple(alert for alert in report.alerts if self._is_told(alert))
        closed = tuple(each for each in report.closed if serial_of(each.leak) in self._sockets)
        present = {serial_of(leak) for leak in report.leaks}
        self._sockets = {serial_of(leak) for leak in leaks} | (self._sockets & present)
        if leaks or alerts or closed:
            omitted = report.omitted + len(report.accused) - sum(leak.accused for leak in leaks)
            self._reporter(
                replace(report, leaks=leaks, alerts=alerts, closed=closed, omitted=omitted)
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
