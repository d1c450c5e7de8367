"""Findings become failures of tests, and go out with pytest's own reports.

What the finalizers of other owners' sockets raise in a check becomes warnings. Loaded with the
first finding, or the first check.
"""

from __future__ import annotations

import _socket
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import NamedTuple, Protocol

import pytest

from closewait_guard._capture import Creation
from closewait_guard._enums import Origin
from closewait_guard._format import WIDTH, escape_line
from closewait_guard._inspect import record_of
from closewait_guard._live import locals_of
from closewait_guard.model import Finding, Frame, Verdict
from closewait_guard.pytest_plugin._attribution import Owner
from closewait_guard.pytest_plugin._excuses import nearest_target
from closewait_guard.pytest_plugin._findings import OwnerFinding, group_by_site, junit_properties
from closewait_guard.pytest_plugin._text import failure_text, headline

__all__ = [
    "Failure",
    "FindingSink",
    "PendingFindings",
    "UnraisableOfOther",
    "UnraisablesOfOthers",
    "have_raised",
    "make_error_report",
    "make_failure",
    "set_crash_location",
    "terminal_width",
    "without_own_calls",
]


class Failure(NamedTuple):
    """What to fail with: the whole text, one line of it, and the first line of code that leaks."""

    text: str
    headline: str
    frame: Frame | None


def make_failure(finding: OwnerFinding, config: pytest.Config) -> Failure:
    """Make what a test or fixture that leaked fails with."""
    root = config.rootpath
    sites = group_by_site([finding], root)
    return Failure(
        failure_text(
            finding,
            root,
            width=terminal_width(config),
            whole_stacks=config.getoption("verbose") > 0,
        ),
        headline(finding, root),
        sites[0].frame if sites else None,
    )


def terminal_width(config: pytest.Config) -> int:
    """The columns of pytest's own lines; a worker of pytest-xdist does not know them."""
    has_terminal = config.pluginmanager.has_plugin("terminalreporter")
    return config.get_terminal_writer().fullwidth if has_terminal else WIDTH


def make_error_report(
    finding: OwnerFinding, nodeid: str, config: pytest.Config
) -> pytest.TestReport:
    """Make a report of its own: for a fixture, or for a test whose reports are made already."""
    failure = make_failure(finding, config)
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
        user_properties=junit_properties(finding, config.rootpath),
    )
    set_crash_location(report, failure)
    return report


def set_crash_location(report: pytest.TestReport, failure: Failure) -> None:
    """Name the line that leaks, not our own, where pytest has room for one line.

    On a CI server the short summary shows all of this message, even if it has twenty lines.
    """
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        crash.message = failure.headline
        if failure.frame is not None:
            crash.path, crash.lineno = escape_line(failure.frame.filename), failure.frame.lineno


class UnraisableOfOther(NamedTuple):
    """What a finalizer raised over a socket of an owner that pytest would not book it on.

    Attributes:
        text: The exception in one line.
        found_by: In whose check the socket was collected.
    """

    owner: Owner
    creation: Creation
    text: str
    found_by: Owner

    def warn(self, config: pytest.Config) -> None:
        """Have pytest list it among the warnings of its owner."""
        line = record_of(self.creation, self.creation.pid).site
        where = "opened outside of the tests; " if not self.owner.name else ""
        text = f"{self.text}\n({where}found by the socket check of {self.found_by.name})"
        message = warnings.WarningMessage(
            pytest.PytestUnraisableExceptionWarning(text),
            pytest.PytestUnraisableExceptionWarning,
            line.filename if line is not None else "<unknown>",
            line.lineno if line is not None else 0,
        )
        arguments = {"nodeid": self.owner.nodeid, "when": "runtest", "location": None}
        config.hook.pytest_warning_recorded.call_historic(
            kwargs={"warning_message": message, **arguments}
        )


class UnraisablesOfOthers(AbstractContextManager[None]):
    """Keeps apart what finalizers raise, in a check, over garbage sockets of other owners.

    A check collects garbage, and pytest books what that raises on the test that is torn down,
    whosever it is. All else goes to the hook that is there, as ever.

    Args:
        creations: Those of what is open.
        owner_of: Finds the owner of each.
        found_by: Whose check it is.
        booked: Whether pytest books on that owner at this moment.
        warn: Takes each at the end.
    """

    def __init__(
        self,
        creations: Iterable[Creation],
        owner_of: Callable[[Creation], Owner],
        found_by: Owner,
        warn: Callable[[UnraisableOfOther], None],
        *,
        booked: bool,
    ) -> None:
        # Not what a pool has handed out: that is no socket object.
        alive = {
            each.serial: each
            for each in creations
            if each.sock() is not None and each.origin is not Origin.CHECKED_OUT
        }
        self._sockets = {serial: (each, owner_of(each)) for serial, each in alive.items()}
        self._targets = {each.object_id: serial for serial, each in alive.items()}
        self._numbers: dict[int | None, int] = {
            _number_of(each.sock()): serial for serial, each in alive.items()
        }
        self._found_by = found_by
        self._booked_on = found_by if booked else None
        self._warn = warn
        self._found: list[UnraisableOfOther] = []
        self._before = sys.unraisablehook
        self._ours = self._hook

    def __enter__(self) -> None:
        sys.unraisablehook = self._ours

    def __exit__(self, *failure: object) -> None:
        if sys.unraisablehook is self._ours:
            sys.unraisablehook = self._before
        for each in self._found:
            self._warn(each)

    def _hook(self, unraisable: sys.UnraisableHookArgs) -> None:
        # Nothing of it is kept: the object would live on.
        finalized = _finalized(unraisable)
        if finalized is not None:
            serial = nearest_target(finalized, self._targets)
        else:
            serial = self._numbers.get(_number_in(unraisable.err_msg))
        found = self._sockets[serial] if serial is not None else None
        if found is not None and finalized is None:
            finalized = found[0].sock()
        if found is not None and self._is_of_other(finalized, *found):
            creation, owner = found
            text = _one_line(unraisable)
            self._found.append(UnraisableOfOther(owner, creation, text, self._found_by))
        else:
            self._before(unraisable)

    def _is_of_other(self, finalized: object, creation: Creation, owner: Owner) -> bool:
        """Whether it is due to another owner. What only uses a socket that stays is not."""
        sock = creation.sock()
        is_due_to_owner = sock is None or sock is finalized or owner.finished
        return is_due_to_owner and owner is not self._booked_on


def _number_of(sock: object) -> int:
    # An owner, whose sockets C code has opened, has none.
    return _socket.socket.fileno(sock) if isinstance(sock, _socket.socket) else -1


def _number_in(message: str | None) -> int | None:
    """The descriptor of the socket whose finalizer in C has raised: Python 3.14 names no object."""
    found = _FINALIZING.search(message or "")
    return None if found is None else int(found[1])


_FINALIZING = re.compile(r"finalizing socket <.*?\bfd=(\d+)")


def _finalized(unraisable: sys.UnraisableHookArgs) -> object:
    """The object whose finalizer has raised; of one in Python its first argument."""
    trace = unraisable.exc_traceback
    code = trace.tb_frame.f_code if trace is not None else None
    if trace is None or code is None or code.co_name != "__del__" or not code.co_argcount:
        return unraisable.object
    return locals_of(trace.tb_frame).get(code.co_varnames[0])


def _one_line(unraisable: sys.UnraisableHookArgs) -> str:
    lines = traceback.format_exception_only(unraisable.exc_type, unraisable.exc_value)
    return lines[-1].strip()


def have_raised(failures: Iterable[BaseException], leaks: Iterable[Finding]) -> bool:
    """Whether a test has failed for the warning of each of its dropped sockets already."""
    warned = Counter(
        int(descriptor)
        for failure in failures
        for error in _causes_of(failure)
        if isinstance(error, ResourceWarning)
        for descriptor in _UNCLOSED.findall(str(error))
    )
    leaks = tuple(leaks)
    only_dropped = all(leak.verdict is Verdict.DROPPED for leak in leaks)
    return only_dropped and Counter(leak.observation.fd for leak in leaks) <= warned


_UNCLOSED = re.compile(r"unclosed .*?\bfd=(\d+)")


def _causes_of(error: BaseException) -> Iterator[BaseException]:
    """An exception, those of a group, and what they were raised from."""
    yield error
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for each in (*inner, *([error.__cause__] if error.__cause__ is not None else [])):
        yield from _causes_of(each)


def without_own_calls(error: Exception) -> Exception:
    """What pytest raises in a check: the calls of that check are nothing to read for the user."""
    for each in _causes_of(error):
        trace = each.__traceback__
        while trace is not None and _is_own(trace.tb_frame):
            trace = trace.tb_next
        each.__traceback__ = trace
    return error


def _is_own(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("closewait_guard.")


class FindingSink(Protocol):
    """Where findings go: to the collector of this process, or to that of the controller."""

    def send_with_report(self, report: pytest.TestReport, findings: list[OwnerFinding]) -> None:
        """Take what has been found up to the end of this test."""

    def send_late(self, session: pytest.Session, findings: list[OwnerFinding]) -> None:
        """Take what was found when no test was left."""


class PendingFindings:
    """Keeps findings until a test's last report, which they go out with.

    Registered with the first: a hook for every report slows a suite of short tests.

    Attributes:
        check_later: Called, once, when pytest has let go of what it has noted of a test.
    """

    check_later: Callable[[], Iterable[OwnerFinding]] = tuple

    def __init__(self, config: pytest.Config, sink: FindingSink) -> None:
        self._config = config
        self._sink = sink
        self._findings: list[OwnerFinding] = []
        self._late_failures: list[OwnerFinding] = []
        # A plugin that runs tests again may drop the report of this one.
        self._failures_by_nodeid: dict[str, Failure] = {}
        config.pluginmanager.register(self, "closewait_guard_pending_findings")

    def add(self, finding: OwnerFinding) -> None:
        """Have it go out with the next report of a teardown."""
        self._findings.append(finding)
        if finding.is_failure and finding.kind == "fixture":
            self._late_failures.append(finding)

    def make_exception(self, nodeid: str, failure: Failure) -> BaseException:
        """Make what fails the test of that name, which is being torn down."""
        self._failures_by_nodeid = {nodeid: failure}
        return pytest.fail.Exception(failure.text, pytrace=False)

    def flush_late(self, session: pytest.Session, findings: list[OwnerFinding]) -> None:
        """Send what no report is left for, after what has not gone out."""
        pending, self._findings = self._findings, []
        if pending or findings:
            self._sink.send_late(session, pending + findings)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Send with a test's last report what has been found since the one before."""
        if not self._findings or report.when != "teardown":
            return
        failure = self._failures_by_nodeid.pop(report.nodeid, None)
        if failure is not None:
            set_crash_location(report, failure)
        findings, self._findings = self._findings, []
        self._sink.send_with_report(report, findings)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Fixtures that have leaked fail on their own: the last test to use one is not to blame.

        The error has that test's id all the same: that is where `--lf` finds the fixture again.
        """
        check, self.check_later = self.check_later, tuple
        for finding in check():
            self._findings.append(finding)
            self._late_failures += [finding] if finding.is_failure else []
        while self._late_failures:
            report = make_error_report(self._late_failures.pop(0), nodeid, self._config)
            self._config.hook.pytest_runtest_logreport(report=report)
