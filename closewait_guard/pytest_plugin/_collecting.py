"""Where all findings come together: with pytest-xdist in the controller, else beside the tests.

From a worker of pytest-xdist to its controller.

Findings as JSON lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from closewait_guard._files import OutputFile
from closewait_guard.pytest_plugin._options import Options

if TYPE_CHECKING:
    from closewait_guard.pytest_plugin._findings import OwnerFinding

__all__ = [
    "FindingCollector",
    "JsonFile",
    "XdistReceiver",
    "XdistSender",
]


class FindingCollector:
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
            self._file = JsonFile(config, options.json)
            config.add_cleanup(self._file.close)
        self._findings: list[OwnerFinding] = []

    def pytest_sessionstart(self) -> None:
        """Only now is it known whether workers of pytest-xdist run the tests."""
        if self._config.pluginmanager.has_plugin("dsession"):
            self._config.pluginmanager.register(XdistReceiver(self), "closewait_guard_receiver")

    def with_report(self, report: pytest.TestReport, findings: Iterable[OwnerFinding]) -> None:  # noqa: ARG002
        """From the tests of this process."""
        self.take(findings)

    def late(self, session: pytest.Session, findings: Iterable[OwnerFinding]) -> None:
        """The same, when no test is left whose failing could tell the outcome of the run."""
        self.fail(findings)
        if session.testsfailed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def take(self, findings: Iterable[OwnerFinding]) -> None:
        """Keep them to be told at the end, and in the file."""
        for finding in findings:
            self._findings.append(finding)
            if self._file is not None and finding.report is not None:
                self._file.write(finding.plain())

    def fail(self, findings: Iterable[OwnerFinding]) -> None:
        """Fail with an error of its own each that was found when no test was left to tell it."""
        for finding in findings:
            self.take([finding])
            if finding.fails:
                from closewait_guard.pytest_plugin._failing import as_report

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
            from closewait_guard._format import escape_line

            for note in self._notes:
                terminalreporter.write_line(escape_line(f"closewait-guard: {note}"), yellow=True)
            if failure:
                terminalreporter.write_line(escape_line(f"ERROR: {failure}"), red=True)
        if not self._findings:
            return
        from closewait_guard.pytest_plugin._text import commands, summary

        lines = summary(self._findings, self._config.rootpath, whole_stacks=self._verbose)
        if lines:
            terminalreporter.section("socket leaks")
        if os.environ.get("GITHUB_ACTIONS"):
            lines += commands(self._findings, self._config.rootpath)
        for line in lines:
            terminalreporter.write_line(line)


class XdistSender:
    """Sends findings with the reports of tests, and the last ones with the worker's farewell."""

    def with_report(self, report: Any, findings: list[OwnerFinding]) -> None:
        """Attributes of a report are sent along with it."""
        report.socket_leaks = [finding.plain() for finding in findings]

    def late(self, session: pytest.Session, findings: list[OwnerFinding]) -> None:
        """No report is left that could carry them."""
        sent = [finding.plain() for finding in findings]
        session.config.workeroutput["socket_leaks"] = sent  # type: ignore[attr-defined]


class XdistReceiver:
    """The other end, in the controller."""

    def __init__(self, ledger: FindingCollector) -> None:
        self._ledger = ledger

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """What came with a report."""
        self._ledger.take(_findings(getattr(report, "socket_leaks", ())))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """What came with a worker's farewell."""
        self._ledger.fail(_findings(getattr(node, "workeroutput", {}).get("socket_leaks", ())))


def _findings(sent: Any) -> list[OwnerFinding]:
    if not sent:
        return []
    from closewait_guard.pytest_plugin._findings import OwnerFinding

    return [OwnerFinding.of(data) for data in sent]


class JsonFile:
    """One JSON object a line. Begun anew for each run, so that it is there even if nothing leaks.

    Attributes:
        failure: A sentence that says why lines are missing, if any are.

    Raises:
        pytest.UsageError: It cannot be written.
    """

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._path = config.invocation_params.dir / path
        self._missing = 0
        self._reason = ""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = OutputFile(self._path)
            self._file.clear()
        except (OSError, ValueError) as error:
            raise pytest.UsageError(self._sentence(error)) from error

    @property
    def failure(self) -> str | None:
        if not self._missing:
            return None
        return f"{self._reason}; findings that are missing in it: {self._missing:,}"

    def write(self, data: Mapping[str, Any]) -> None:
        """Add one line; one that cannot be written is counted, and costs no other."""
        # In a string of JSON, what replaces half a surrogate pair is the escape for it.
        text = json.dumps(data, ensure_ascii=False) + "\n"
        try:
            if not self._file.is_current():
                self._file.reopen()
            self._file.append(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self._missing += 1
            self._reason = self._reason or self._sentence(error)

    def close(self) -> None:
        """Give the descriptor back."""
        self._file.close()

    def _sentence(self, error: Exception) -> str:
        reason = getattr(error, "strerror", None) or error
        return f"socket_leaks_json: {self._path} cannot be written: {reason}"
