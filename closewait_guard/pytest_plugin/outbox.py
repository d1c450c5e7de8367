"""What has been found goes out with pytest's own reports. A run that finds nothing pays nothing."""

from __future__ import annotations

from typing import Protocol

import pytest

from closewait_guard.pytest_plugin.failure import Failure, as_report, point_out
from closewait_guard.pytest_plugin.finding import Finding

__all__ = ["Desk", "Outbox"]


class Desk(Protocol):
    """Where findings go: the ledger of this process, or the wire to the controller."""

    def with_report(self, report: pytest.TestReport, findings: list[Finding]) -> None:
        """What has been found up to the end of this test."""

    def late(self, session: pytest.Session, findings: list[Finding]) -> None:
        """What was found when no test was left."""


class Outbox:
    """Made with the first finding: a hook for every report is dear in a suite of short tests."""

    def __init__(self, config: pytest.Config, desk: Desk) -> None:
        self._config = config
        self._desk = desk
        self._findings: list[Finding] = []
        self._of_fixtures: list[Finding] = []
        # By test: a plugin that runs tests again may drop the report of this one.
        self._raised: dict[str, Failure] = {}
        config.pluginmanager.register(self, "closewait_guard_outbox")

    def put(self, finding: Finding) -> None:
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

    def late(self, session: pytest.Session, findings: list[Finding]) -> None:
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
            point_out(report, raised)
        findings, self._findings = self._findings, []
        self._desk.with_report(report, findings)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Fixtures that have leaked fail on their own: the last test to use one is not to blame.

        The error has that test's id all the same: that is where `--lf` finds the fixture again.
        """
        while self._of_fixtures:
            report = as_report(self._of_fixtures.pop(0), nodeid, self._config)
            self._config.hook.pytest_runtest_logreport(report=report)
