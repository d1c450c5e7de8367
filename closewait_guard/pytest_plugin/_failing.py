"""How a leak becomes an error that pytest, its terminal and its XML file understand.

What has been found goes out with pytest's own reports. A run that finds nothing pays nothing.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import pytest

from closewait_guard._format import escape_line
from closewait_guard.model import Frame
from closewait_guard.pytest_plugin._findings import OwnerFinding
from closewait_guard.pytest_plugin._text import failure_text, headline, properties

__all__ = [
    "Failure",
    "FindingSink",
    "PendingFindings",
    "as_report",
    "failure_of",
    "set_crash_location",
]


class Failure(NamedTuple):
    """What to fail with: the whole text, one line of it, and the first guilty line of code."""

    text: str
    headline: str
    frame: Frame | None


def failure_of(finding: OwnerFinding, config: pytest.Config) -> Failure:
    """What a test or fixture that leaked fails with."""
    leaks = finding.report.findings if finding.report is not None else ()
    return Failure(
        failure_text(finding, whole_stacks=config.getoption("verbose") > 0),
        headline(finding, config.rootpath),
        leaks[0].observation.record.site if leaks else None,
    )


def as_report(finding: OwnerFinding, nodeid: str, config: pytest.Config) -> pytest.TestReport:
    """An error of its own: for a fixture, or for a test whose reports have been made already."""
    failure = failure_of(finding, config)
    path = (finding.nodeid or nodeid).partition("::")[0]
    try:
        pytest.fail(failure.text, pytrace=False)
    except pytest.fail.Exception:
        error = pytest.ExceptionInfo.from_current()
    report = pytest.TestReport(
        nodeid=nodeid,
        location=(path, None, escape_line(finding.owner)),
        keywords={},
        outcome="failed",
        longrepr=error.getrepr(style="value"),
        when="teardown",
        user_properties=properties(finding),
    )
    set_crash_location(report, failure)
    return report


def set_crash_location(report: pytest.TestReport, failure: Failure) -> None:
    """Name the line that leaks, not our own, where pytest has room for one line.

    On a CI server the short summary shows all of this message, be it twenty lines.
    """
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        crash.message = failure.headline
        if failure.frame is not None:
            crash.path, crash.lineno = escape_line(failure.frame.filename), failure.frame.lineno


class FindingSink(Protocol):
    """Where findings go: the ledger of this process, or the wire to the controller."""

    def with_report(self, report: pytest.TestReport, findings: list[OwnerFinding]) -> None:
        """What has been found up to the end of this test."""

    def late(self, session: pytest.Session, findings: list[OwnerFinding]) -> None:
        """What was found when no test was left."""


class PendingFindings:
    """Made with the first finding: a hook for every report is dear in a suite of short tests."""

    def __init__(self, config: pytest.Config, desk: FindingSink) -> None:
        self._config = config
        self._desk = desk
        self._findings: list[OwnerFinding] = []
        self._of_fixtures: list[OwnerFinding] = []
        # By test: a plugin that runs tests again may drop the report of this one.
        self._raised: dict[str, Failure] = {}
        config.pluginmanager.register(self, "closewait_guard_outbox")

    def put(self, finding: OwnerFinding) -> None:
        """To go out with the next report of a teardown."""
        self._findings.append(finding)
        if finding.fails and finding.kind == "fixture":
            self._of_fixtures.append(finding)

    def fail(self, nodeid: str, failure: Failure) -> None:
        """Fail the test of that name, which is being torn down.

        Raises:
            pytest.fail.Exception: Always.
        """
        self._raised = {nodeid: failure}
        pytest.fail(failure.text, pytrace=False)

    def late(self, session: pytest.Session, findings: list[OwnerFinding]) -> None:
        """What no report is left for, after what has not gone out."""
        waiting, self._findings = self._findings, []
        if waiting or findings:
            self._desk.late(session, waiting + findings)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Hand on with a test's last report what has been found since the one before."""
        if not self._findings or report.when != "teardown":
            return
        raised = self._raised.pop(report.nodeid, None)
        if raised is not None:
            set_crash_location(report, raised)
        findings, self._findings = self._findings, []
        self._desk.with_report(report, findings)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Fixtures that have leaked fail on their own: the last test to use one is not to blame.

        The error has that test's id all the same: that is where `--lf` finds the fixture again.
        """
        while self._of_fixtures:
            report = as_report(self._of_fixtures.pop(0), nodeid, self._config)
            self._config.hook.pytest_runtest_logreport(report=report)
