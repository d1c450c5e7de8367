"""Collects the findings of a run, prints them at its end, and writes them as JSON lines.

With pytest-xdist the workers send them to the controller.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from closewait_guard.pytest_plugin._options import Options

if TYPE_CHECKING:
    from closewait_guard.pytest_plugin._baseline_run import BaselineRun
    from closewait_guard.pytest_plugin._findings import OwnerFinding

__all__ = [
    "FindingCollector",
    "JsonFile",
    "XdistReceiver",
    "XdistSender",
]


class FindingCollector:
    """The sink in the process that prints: without pytest-xdist that of the tests.

    Args:
        config: That of the run.
        options: What the run asks for.
        notes: What else to say at the end, a sentence each.
    """

    def __init__(self, config: pytest.Config, options: Options, notes: Iterable[str] = ()) -> None:
        self._config = config
        self._notes = notes
        self._baseline: BaselineRun | None = config.pluginmanager.get_plugin(
            "closewait_guard_baseline"
        )
        self._file: JsonFile | None = None
        if options.json is not None:
            self._file = JsonFile(config, options.json)
            config.add_cleanup(self._file.close)
        self._findings: list[OwnerFinding] = []
        self._has_unknown = False

    def pytest_sessionstart(self) -> None:
        """Only now is it known whether workers of pytest-xdist run the tests."""
        if self._config.pluginmanager.has_plugin("dsession"):
            self._config.pluginmanager.register(
                XdistReceiver(self), "closewait_guard_xdist_receiver"
            )

    def send_with_report(self, report: pytest.TestReport, findings: Iterable[OwnerFinding]) -> None:  # noqa: ARG002
        """Take what was found up to the end of a test."""
        self.add(findings)

    def send_late(self, session: pytest.Session, findings: Iterable[OwnerFinding]) -> None:
        """Take what was found after the last test, and fail the run where a test would fail."""
        self.fail_late(findings)
        if session.testsfailed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def add(self, findings: Iterable[OwnerFinding]) -> None:
        """Keep findings for the end of the run, and write them to the file."""
        for finding in findings:
            self._findings.append(finding)
            self._has_unknown |= finding.outcome == "unknown"
            if self._baseline is not None:
                self._baseline.add(finding)
            if self._file is not None and finding.report is not None:
                self._file.write(finding.to_dict())

    def fail_late(self, findings: Iterable[OwnerFinding]) -> None:
        """Add findings that no report of a test can carry: each failure gets one of its own."""
        for finding in findings:
            self.add([finding])
            if finding.is_failure:
                from closewait_guard.pytest_plugin._failing import make_error_report

                nodeid = finding.last_test or finding.nodeid or finding.owner
                report = make_error_report(finding, nodeid, self._config)
                self._config.hook.pytest_runtest_logreport(report=report)

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        """A run whose leaks are not all known, or whose file is incomplete, is no clean one."""
        yield
        if self._baseline is not None:
            self._baseline.finish(session.exitstatus)
        is_dirty = self._has_unknown or self._find_failures()
        if is_dirty and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _find_failures(self) -> list[str]:
        """What could not be written, a sentence each."""
        found = [each.failure for each in (self._file, self._baseline) if each is not None]
        return [failure for failure in found if failure]

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, exitstatus: int
    ) -> None:
        known = self._baseline.finish(exitstatus) if self._baseline is not None else []
        failures = self._find_failures()
        if self._notes or failures:
            from closewait_guard._format import escape_line

            for note in self._notes:
                terminalreporter.write_line(escape_line(f"closewait-guard: {note}"), yellow=True)
            for failure in failures:
                terminalreporter.write_line(escape_line(f"ERROR: {failure}"), red=True)
        lines = self._summary_lines() if self._findings else []
        if lines or known:
            terminalreporter.section("socket leaks")
        if os.environ.get("GITHUB_ACTIONS") and self._findings:
            from closewait_guard.pytest_plugin._findings import github_commands

            lines += github_commands(self._findings, self._config.rootpath)
        for line in (*lines, *([""] if lines and known else []), *known):
            terminalreporter.write_line(line)

    def _summary_lines(self) -> list[str]:
        from closewait_guard.pytest_plugin._failing import terminal_width
        from closewait_guard.pytest_plugin._text import summary_lines

        return summary_lines(
            self._findings,
            self._config.rootpath,
            width=terminal_width(self._config),
            whole_stacks=self._config.getoption("verbose") > 0,
        )


class XdistSender:
    """The sink in a worker of pytest-xdist."""

    def send_with_report(self, report: Any, findings: list[OwnerFinding]) -> None:
        """Add them to the report: its attributes are sent along with it."""
        report.socket_leaks = [finding.to_dict() for finding in findings]

    def send_late(self, session: pytest.Session, findings: list[OwnerFinding]) -> None:
        """Add them to what the worker sends when it ends: no report is left to carry them."""
        sent = [finding.to_dict() for finding in findings]
        session.config.workeroutput["socket_leaks"] = sent  # type: ignore[attr-defined]


class XdistReceiver:
    """Hands what workers send to the collector, in the controller of pytest-xdist."""

    def __init__(self, collector: FindingCollector) -> None:
        self._collector = collector

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what came with a report."""
        self._collector.add(_received(getattr(report, "socket_leaks", ())))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take what came when the worker ended."""
        sent = getattr(node, "workeroutput", {}).get("socket_leaks", ())
        self._collector.fail_late(_received(sent))


def _received(sent: Any) -> list[OwnerFinding]:
    if not sent:
        return []
    from closewait_guard.pytest_plugin._findings import OwnerFinding

    return [OwnerFinding.from_dict(data) for data in sent]


class JsonFile:
    """One JSON object a line. Emptied when a run begins, so that it is there even if nothing leaks.

    Attributes:
        failure: A sentence that says why lines are missing, if any are.

    Raises:
        pytest.UsageError: It cannot be written.
    """

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._path = config.invocation_params.dir / path
        # A run that writes no such file does without the module.
        from closewait_guard._files import OutputFile

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
