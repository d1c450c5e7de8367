"""From a worker of pytest-xdist to its controller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from closewait_guard.pytest_plugin.finding import Finding
    from closewait_guard.pytest_plugin.ledger import Ledger

__all__ = ["Receiver", "Wire"]


class Wire:
    """Sends findings with the reports of tests, and the last ones with the worker's farewell."""

    def with_report(self, report: Any, findings: list[Finding]) -> None:
        """Attributes of a report are sent along with it."""
        report.socket_leaks = [finding.plain() for finding in findings]

    def late(self, session: pytest.Session, findings: list[Finding]) -> None:
        """No report is left that could carry them."""
        sent = [finding.plain() for finding in findings]
        session.config.workeroutput["socket_leaks"] = sent  # type: ignore[attr-defined]


class Receiver:
    """The other end, in the controller."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """What came with a report."""
        self._ledger.take(_findings(getattr(report, "socket_leaks", ())))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """What came with a worker's farewell."""
        self._ledger.fail(_findings(getattr(node, "workeroutput", {}).get("socket_leaks", ())))


def _findings(sent: Any) -> list[Finding]:
    if not sent:
        return []
    from closewait_guard.pytest_plugin.finding import Finding

    return [Finding.of(data) for data in sent]
