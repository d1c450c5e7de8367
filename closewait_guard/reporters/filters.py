"""Reporters that filter for another: `at_least` by severity, `changes` by news, `every` by time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from closewait_guard._clock import now
from closewait_guard._config import require_number, shown, unknown_name
from closewait_guard._config import seconds as parse_seconds
from closewait_guard._enums import FOLLOWED
from closewait_guard._stream import close_reporter, flush_reporter, lost_by, reporter_name
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import (
    Alert,
    AlertKind,
    AlertStatus,
    ClosedLate,
    Finding,
    Report,
    Reporter,
    Scalar,
    Severity,
    SiteGroup,
    Verdict,
    site_key,
)

__all__ = [
    "Quiet",
    "at_least",
    "changes",
    "every",
    "subject_of",
]

_MAX_WAITING = 1000
# Of which alerts there may be several at a time, and what in their data each is about.
_SUBJECTS = {AlertKind.GROWTH: "site", AlertKind.CHURN: "site", AlertKind.POOL_EXHAUSTED: "pool"}


class _Wrapping:
    """A reporter that hands on to another; closing it closes the other."""

    def __init__(self, name: str, reporter: Reporter) -> None:
        if not callable(reporter):
            raise ConfigurationError(
                f"{name}: expected a callable that takes a report, got {shown(reporter)}"
            )
        self._name = name
        self._reporter = reporter

    def close(self) -> None:
        close_reporter(self._reporter)

    def flush(self) -> None:
        flush_reporter(self._reporter)

    @property
    def lost(self) -> int:
        return lost_by(self._reporter)

    def __repr__(self) -> str:
        return f"{self._name}({reporter_name(self._reporter)})"


def subject_of(alert: Alert) -> Scalar:
    """What an alert is about, where there may be several of its kind at a time."""
    return alert.data.get(_SUBJECTS.get(alert.kind, ""))


def _serial_of(finding: Finding) -> int:
    """The serial number of the socket of a finding."""
    return finding.observation.record.serial


def at_least(severity: Severity | str, reporter: Reporter) -> Reporter:
    """Hand on only findings and alerts of that severity or worse, and nothing if there are none.

    A reporter that was given an alert is also given its improvement and its end, and one that was
    given a leaked socket, that it was closed late.

    Example:
        >>> from closewait_guard import reporters
        >>> at_least("critical", reporters.text())
        at_least(text())
    """
    return _AtLeast(severity, reporter)


class _AtLeast(_Wrapping):
    def __init__(self, severity: Severity | str, reporter: Reporter) -> None:
        super().__init__("at_least", reporter)
        self._alerts: set[object] = set()
        self._sockets: set[int] = set()
        try:
            self._rank = Severity(severity).rank
        except ValueError:
            why = unknown_name("severity", severity, Severity, "Severities")
            raise ConfigurationError(f"at_least: {why}") from None

    def __call__(self, report: Report, /) -> None:
        findings = tuple(finding for finding in report.findings if self._matters(finding.severity))
        alerts = tuple(alert for alert in report.alerts if self._should_report(alert))
        closed = tuple(
            each for each in report.closed_late if _serial_of(each.finding) in self._sockets
        )
        present = {_serial_of(finding) for finding in report.findings}
        self._sockets = {_serial_of(finding) for finding in findings} | (self._sockets & present)
        if findings or alerts or closed:
            omitted = (
                report.omitted + len(report.leaks) - sum(finding.is_leak for finding in findings)
            )
            self._reporter(
                replace(
                    report, findings=findings, alerts=alerts, closed_late=closed, omitted=omitted
                )
            )

    def _should_report(self, alert: Alert) -> bool:
        key = (alert.kind, subject_of(alert))
        was_reported, matters = key in self._alerts, self._matters(alert.severity)
        if matters and alert.status is not AlertStatus.RESOLVED:
            self._alerts.add(key)
        else:
            self._alerts.discard(key)
        return was_reported or matters

    def _matters(self, severity: Severity) -> bool:
        return severity.rank >= self._rank


def changes(reporter: Reporter) -> Reporter:
    """Hand on only what has changed since the last report, and nothing if nothing has.

    What counts are sites, not single sockets. A site is reported when it first leaks, when the
    number of its leaks has doubled or their severity rises, and, with all that were closed late,
    when none is left. A site of findings that are not leaks comes along once, but does not cause a
    report, unless a server does not answer; connections that are closing at this moment never do.
    What is left out is counted in `Report.omitted`. If the reporter raises, the sites of that
    report are in the next one again.

    `every(60, changes(reporter))` loses nothing, while `changes(every(60, reporter))` loses most
    changes between two reports.

    Example:
        >>> from closewait_guard import Guard
        >>> from closewait_guard.testing import CapturingReporter
        >>> reporter = CapturingReporter()
        >>> with Guard(reporters=[changes(reporter)]) as guard:
        ...     _ = guard.report()
        >>> reporter.reports
        []
    """
    return _Changes("changes", reporter)


class _Reported(NamedTuple):
    """A site as it was last reported."""

    sockets: int
    severity: Severity

    def has_changed(self, group: SiteGroup) -> bool:
        """Whether it has grown, or got worse."""
        return group.count >= 2 * self.sockets or group.severity.rank > self.severity.rank


class _Changes(_Wrapping):
    def __init__(self, name: str, reporter: Reporter) -> None:
        super().__init__(name, reporter)
        self._reported: dict[object, _Reported] = {}
        # Of the sites that still leak.
        self._closed: tuple[ClosedLate, ...] = ()

    def __call__(self, report: Report, /) -> None:
        sites = {
            site_key(group.findings[0]): group
            for group in report.by_site()
            if group.verdict is not Verdict.CLOSING
        }
        changed = {site: group for site, group in sites.items() if self._has_changed(site, group)}
        closed = [
            (site, each)
            for each in (*self._closed, *report.closed_late)
            if (site := site_key(each.finding)) in self._reported
        ]
        # Before the reporter is called, which may raise.
        self._closed = tuple(each for _, each in closed)[-_MAX_WAITING:]
        ended = tuple(each for site, each in closed if site not in sites)
        if ended or report.alerts or any(map(_is_news, changed.values())):
            self._reporter(_only(report, changed.values(), ended))
            self._reported |= {
                site: _Reported(group.count, group.severity) for site, group in changed.items()
            }
        self._reported = {site: known for site, known in self._reported.items() if site in sites}
        self._closed = tuple(each for site, each in closed if site in sites)[-_MAX_WAITING:]

    def _has_changed(self, site: object, group: SiteGroup) -> bool:
        reported = self._reported.get(site)
        return reported is None or reported.has_changed(group)


def _is_news(group: SiteGroup) -> bool:
    """Whether a site that has changed is worth a report by itself."""
    is_unanswered = group.verdict is Verdict.UNANSWERED and group.severity is not Severity.INFO
    return group.verdict in FOLLOWED or is_unanswered


def _only(
    report: Report, groups: Iterable[SiteGroup], closed_late: tuple[ClosedLate, ...]
) -> Report:
    """The report of these sites; the other leaks are counted as omitted."""
    findings = tuple(finding for group in groups for finding in group.findings)
    omitted = report.omitted + sum(each.count for each in report.leaks)
    omitted -= sum(each.count for each in findings if each.is_leak)
    return replace(report, findings=findings, closed_late=closed_late, omitted=omitted)


def every(seconds: float, reporter: Reporter, *, clock: Callable[[], float] = now) -> Reporter:
    """Hand on the first report, and then at most one every so many seconds.

    Alerts and sockets closed late are not lost: the last thousand of each wait for the next report
    that the reporter takes.

    Example:
        >>> from closewait_guard import reporters
        >>> every(3600, reporters.text())
        every(text())
    """
    return _Every(seconds, reporter, clock)


class _Every(_Wrapping):
    def __init__(self, seconds: float, reporter: Reporter, clock: Callable[[], float]) -> None:
        super().__init__("every", reporter)
        self._seconds = require_number(parse_seconds, seconds, "every(seconds)")
        self._clock = clock
        self._next = -math.inf
        self._alerts: tuple[Alert, ...] = ()
        self._closed: tuple[ClosedLate, ...] = ()

    def __call__(self, report: Report, /) -> None:
        self._alerts = (*self._alerts, *report.alerts)[-_MAX_WAITING:]
        self._closed = (*self._closed, *report.closed_late)[-_MAX_WAITING:]
        at = self._clock()
        if at >= self._next:
            self._next = at + self._seconds
            self._reporter(replace(report, alerts=self._alerts, closed_late=self._closed))
            # Not before, because the reporter may have raised.
            self._alerts = self._closed = ()


class Quiet:
    """Writes every report that it is called with; of those of a monitor, only what has changed.

    Args:
        name: What it is called.
        write: Writes a report.
        write_no_news: Writes one line for a report with nothing new in it.
        clock: Seconds that never jump.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[Report], object],
        write_no_news: Callable[[Report], object],
        clock: Callable[[], float] = now,
    ) -> None:
        self._name = name
        self._write = write
        self._write_no_news = write_no_news
        self._clock = clock
        self._changes = changes(self)
        self._written = -math.inf

    def __call__(self, report: Report, /) -> None:
        self._written = self._clock()
        self._write(report)

    def __repr__(self) -> str:
        return f"{self._name}()"

    def periodic(self, report: Report, heartbeat: float) -> None:
        """Take one report of a series.

        Args:
            report: The report.
            heartbeat: After so many seconds without a word, one line says that nothing has
                changed. With 0 every report is written.
        """
        if not heartbeat:
            self(report)
            return
        before = self._written
        self._changes(report)
        if self._written == before and self._clock() - before >= heartbeat:
            self._written = self._clock()
            self._write_no_news(report)
