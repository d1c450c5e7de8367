"""Where all findings come together: with pytest-xdist in the controller, else beside the tests."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import pytest

from closewait_guard.pytest_plugin.options import Options

if TYPE_CHECKING:
    from closewait_guard.pytest_plugin.finding import Finding
    from closewait_guard.pytest_plugin.json_file import JsonFile

__all__ = ["Ledger"]


class Ledger:
    """Takes what is found, fails with it what fails late, and tells it at the end.

    Args:
        config: That of the run.
        options: What the run asks for.
        notes: What else to say at the end, a sentence each.
    """

    def __init__(self, config: pytest.Config, options: Options, notes: Iterable[str] = ()) -> None:
        self._config = config
        self._notes = notes
        self._file: JsonFile | None = None
        if options.json is not None:
            from closewait_guard.pytest_plugin.json_file import JsonFile

            self._file = JsonFile(config, options.json)
            config.add_cleanup(self._file.close)
        self._findings: list[Finding] = []

    def pytest_sessionstart(self) -> None:
        """Only now is it known whether workers of pytest-xdist run the tests."""
        if self._config.pluginmanager.has_plugin("dsession"):
            from closewait_guard.pytest_plugin.wire import Receiver

            self._config.pluginmanager.register(Receiver(self), "closewait_guard_receiver")

    def with_report(self, report: pytest.TestReport, findings: Iterable[Finding]) -> None:  # noqa: ARG002
        """From the tests of this process."""
        self.take(findings)

    def late(self, session: pytest.Session, findings: Iterable[Finding]) -> None:
        """The same, when no test is left whose failing could tell the outcome of the run."""
        self.fail(findings)
        if session.testsfailed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def take(self, findings: Iterable[Finding]) -> None:
        """Keep them to be told at the end, and in the file."""
        for finding in findings:
            self._findings.append(finding)
            if self._file is not None and finding.report is not None:
                self._file.write(finding.plain())

    def fail(self, findings: Iterable[Finding]) -> None:
        """Fail with an error of its own each that was found when no test was left to tell it."""
        for finding in findings:
            self.take([finding])
            if finding.fails:
                from closewait_guard.pytest_plugin.failure import as_report

                report = as_report(finding, finding.nodeid or finding.owner, self._config)
                self._config.hook.pytest_runtest_logreport(report=report)

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        """Whoever reads an incomplete file must not take the run for a clean one."""
        yield
        failure = self._file.failure if self._file is not None else None
        if failure and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @property
    def _verbose(self) -> bool:
        return bool(self._config.getoption("verbose") > 0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        failure = self._file.failure if self._file is not None else None
        if self._notes or failure:
            from closewait_guard._lines import one_line

            for note in self._notes:
                terminalreporter.write_line(one_line(f"closewait-guard: {note}"), yellow=True)
            if failure:
                terminalreporter.write_line(one_line(f"ERROR: {failure}"), red=True)
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
