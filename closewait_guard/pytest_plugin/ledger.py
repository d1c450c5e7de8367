"""Where all findings come together: with pytest-xdist in the controller, else beside the tests."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pytest

from closewait_guard.pytest_plugin.json_file import JsonFile
from closewait_guard.pytest_plugin.options import Options
from closewait_guard.pytest_plugin.wire import received, received_late

if TYPE_CHECKING:
    from closewait_guard.pytest_plugin.finding import Finding

__all__ = ["Ledger"]


class Ledger:
    """Takes what is found, fails with it what fails late, and tells it at the end."""

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self._config = config
        self._file = JsonFile(config, options.json) if options.json is not None else None
        self._findings: list[Finding] = []

    def with_report(self, report: pytest.TestReport, findings: Iterable[Finding]) -> None:  # noqa: ARG002
        """From the tests of this process."""
        self._take(findings)

    def late(self, session: pytest.Session, findings: Iterable[Finding]) -> None:
        """The same, when no test is left whose failing could tell the outcome of the run."""
        self._fail(findings)
        if session.testsfailed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of pytest-xdist has ended."""
        self._fail(received_late(node))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """From a worker of pytest-xdist."""
        if report.when == "teardown":
            self._take(received(report))

    def _take(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self._findings.append(finding)
            if self._file is not None and finding.report is not None:
                self._file.write(finding.plain())

    def _fail(self, findings: Iterable[Finding]) -> None:
        """Fail with an error of its own each that was found when no test was left to tell it."""
        for finding in findings:
            self._take([finding])
            if finding.fails:
                from closewait_guard.pytest_plugin.failure import as_report, failure_of

                name = finding.nodeid or finding.owner
                failure = failure_of(finding, self._config.rootpath, whole_stacks=self._verbose)
                report = as_report(finding, name, failure)
                self._config.hook.pytest_runtest_logreport(report=report)

    @property
    def _verbose(self) -> bool:
        return bool(self._config.getoption("verbose") > 0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._findings:
            return
        from closewait_guard.pytest_plugin.annotations import commands
        from closewait_guard.pytest_plugin.summary import summary

        lines = summary(self._findings, self._config.rootpath, whole_stacks=self._verbose)
        if lines:
            terminalreporter.section("socket leaks")
        if os.environ.get("GITHUB_ACTIONS"):
            lines += commands(self._findings, self._config.rootpath)
        for line in lines:
            terminalreporter.write_line(line)
