"""How a leak becomes an error that pytest, its terminal and its XML file understand."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from closewait_guard._lines import one_line
from closewait_guard.model import Frame
from closewait_guard.pytest_plugin.blame import failure_text, headline, properties
from closewait_guard.pytest_plugin.finding import Finding

__all__ = ["Failure", "as_report", "failure_of", "point_out"]


class Failure(NamedTuple):
    """What to fail with: the whole text, one line of it, and the first guilty line of code."""

    text: str
    headline: str
    frame: Frame | None


def failure_of(finding: Finding, config: pytest.Config) -> Failure:
    """What a test or fixture that leaked fails with."""
    leaks = finding.report.leaks if finding.report is not None else ()
    return Failure(
        failure_text(finding, whole_stacks=config.getoption("verbose") > 0),
        headline(finding, config.rootpath),
        leaks[0].observation.record.site if leaks else None,
    )


def as_report(finding: Finding, nodeid: str, config: pytest.Config) -> pytest.TestReport:
    """An error of its own: for a fixture, or for a test whose reports have been made already."""
    failure = failure_of(finding, config)
    path = (finding.nodeid or nodeid).partition("::")[0]
    try:
        pytest.fail(failure.text, pytrace=False)
    except pytest.fail.Exception:
        error = pytest.ExceptionInfo.from_current()
    report = pytest.TestReport(
        nodeid=nodeid,
        location=(path, None, one_line(finding.owner)),
        keywords={},
        outcome="failed",
        longrepr=error.getrepr(style="value"),
        when="teardown",
        user_properties=properties(finding),
    )
    point_out(report, failure)
    return report


def point_out(report: pytest.TestReport, failure: Failure) -> None:
    """Name the line that leaks, not our own, where pytest has room for one line.

    On a CI server the short summary shows all of this message, be it twenty lines.
    """
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        crash.message = failure.headline
        if failure.frame is not None:
            crash.path, crash.lineno = one_line(failure.frame.filename), failure.frame.lineno
