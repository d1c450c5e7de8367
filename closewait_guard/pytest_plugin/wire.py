"""From a worker of pytest-xdist to its controller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from closewait_guard.pytest_plugin.finding import Finding

__all__ = ["Wire", "received", "received_late"]


class Wire:
    """Sends findings with the reports of tests, and the last ones with the worker's farewell."""

    def with_report(self, report: Any, findings: list[Finding]) -> None:
        """Attributes of a report are sent along with it."""
        report.socket_leaks = [finding.plain() for finding in findings]

    def late(self, session: pytest.Session, findings: list[Finding]) -> None:
        """No report is left that could carry them."""
        sent = [finding.plain() for finding in findings]
        session.config.workeroutput["socket_leaks"] = sent  # type: ignore[attr-defined]


def received(report: pytest.TestReport) -> list[Finding]:
    """What came with a report."""
    return _findings(getattr(report, "socket_leaks", ()))


def received_late(node: Any) -> list[Finding]:
    """What came with a worker's farewell."""
    return _findings(getattr(node, "workeroutput", {}).get("socket_leaks", ()))


def _findings(sent: Any) -> list[Finding]:
    if not sent:
        return []
    from closewait_guard.pytest_plugin.finding import Finding

    return [Finding.of(data) for data in sent]
