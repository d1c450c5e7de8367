"""The test that runs at this moment, and the report of its body."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from closewait_guard.pytest_plugin._attribution import Owner, WiderFixture
from closewait_guard.pytest_plugin._options import Plan

if TYPE_CHECKING:
    from closewait_guard.pytest_plugin._failing import Failure
    from closewait_guard.pytest_plugin._findings import OwnerFinding

__all__ = ["BodyReports", "CheckContext", "CurrentTest"]


class CheckContext(NamedTuple):
    """Whose sockets are checked, and what has to be taken into account.

    Attributes:
        kind: `test` or `fixture`.
        wider_fixtures: Those that stay, the widest first.
        failures: The exceptions that are kept for a debugger.
        kept: What pytest itself keeps of the owner, and lets go of after the check.
        own_functions: Files and names of the test's own functions; what was opened below one is its
            own even if a runner of a wider fixture carried it out.
    """

    owner: Owner
    kind: str
    plan: Plan
    wider_fixtures: Sequence[WiderFixture] = ()
    failures: Callable[[], Sequence[BaseException]] = tuple
    kept: Callable[[], Iterable[object]] = tuple
    own_functions: Callable[[], frozenset[tuple[str, str]]] = frozenset


class CurrentTest:
    """One run of a test, from its set-up to the end of its teardown.

    Attributes:
        has_run_body: Its body came to its end.
        in_teardown: Its own teardown has begun, and may be over.
        is_checked: Its sockets have been checked.
        may_have_collected: For that, garbage may have been collected.
        failures: What its phases have raised.
        failure: What to fail it with.
    """

    has_run_body = False
    in_teardown = False
    is_checked = False
    may_have_collected = False
    failures: tuple[BaseException, ...] = ()
    failure: Failure | None = None

    def __init__(self, item: pytest.Item, plan: Plan, owner: Owner) -> None:
        self.item = item
        self.plan = plan
        self.owner = owner

    def collect_failures(self) -> list[BaseException]:
        """What went wrong so far, and is kept for a debugger."""
        # Where pytest keeps what has failed in the body of the test, for debuggers.
        last = getattr(sys, "last_value", None)
        return [*self.failures, *([last] if isinstance(last, BaseException) else [])]

    def find_kept(self) -> list[object]:
        """The values of its fixtures and its instance: pytest keeps them for a while after it."""
        return [getattr(self.item, name, None) for name in ("funcargs", "_instance")]

    def note_failure(self, finding: OwnerFinding) -> OwnerFinding:
        """Have what its own ResourceWarning has failed the test for already fail it only once."""
        from closewait_guard.pytest_plugin._failing import have_raised
        from closewait_guard.pytest_plugin._findings import FAILED_ALREADY

        leaks = finding.report.findings if finding.report is not None else ()
        if finding.is_failure and have_raised(self.failures, leaks):
            return finding._replace(reason=FAILED_ALREADY)
        return finding

    def add_finding(self, finding: OwnerFinding) -> None:
        """Remember what to fail the test with; add what the XML file says of it."""
        from closewait_guard.pytest_plugin._failing import make_failure
        from closewait_guard.pytest_plugin._findings import junit_properties

        is_allowed = self.plan.allow_reason is not None or finding.outcome == "known"
        if finding.report is not None and not is_allowed:
            root = self.item.config.rootpath
            self.item.user_properties += junit_properties(finding, root)
        if finding.is_failure and not finding.has_failed_already:
            self.failure = make_failure(finding, self.item.config)

    def take_unraisable(self) -> Exception | None:
        """Have pytest take what finalizers raised while the check collected the test's garbage.

        Otherwise the next test would get it: pytest itself has looked before, but for versions
        below 8.4, which look when we have returned.

        Returns:
            What pytest raises for it where warnings are errors.
        """
        config = self.item.config
        plugin = config.pluginmanager.get_plugin("unraisableexception")
        collect = getattr(plugin, "collect_unraisable", None)
        if self.may_have_collected and collect is not None:
            try:
                collect(config)
            except Exception as error:
                from closewait_guard.pytest_plugin._failing import without_own_calls

                return without_own_calls(error)
        return None

    def add_section(self, error: Exception | None) -> None:
        """Show an error in the report of the test, which fails with another."""
        if error is not None:
            text = "".join(traceback.format_exception(error))
            self.item.add_report_section("teardown", "unraisable exceptions", text)

    def has_passed(self) -> bool:
        """Whether its body came to its end, and nothing went wrong."""
        return self.has_run_body and not self.collect_failures()

    def make_unused_waiver(self) -> OwnerFinding:
        """The finding that its marker is not needed any more."""
        from closewait_guard.pytest_plugin._findings import Outcome, OwnerFinding

        return OwnerFinding(
            owner=self.owner.name,
            nodeid=self.owner.nodeid,
            kind="test",
            outcome=Outcome.UNUSED_WAIVER,
            reason=self.plan.allow_reason,
        )

    def find_own_functions(self) -> frozenset[tuple[str, str]]:
        """File and name of its function, and of the fixtures that are made for it alone."""
        functions = (inspect.unwrap(function) for function in _functions_of(self.item))
        codes = (getattr(function, "__code__", None) for function in functions)
        return frozenset((code.co_filename, code.co_qualname) for code in codes if code is not None)


def _functions_of(item: pytest.Item) -> Iterator[Any]:
    function = getattr(item, "function", None)
    if function is not None:
        yield function
    known = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    for definitions in known.values():
        if definitions[-1].scope == "function":
            yield definitions[-1].func


# The report of a body that has passed, until the test is set up again.
_BODY = pytest.StashKey[pytest.TestReport | None]()


class BodyReports:
    """Keeps the report of a test that has passed until its teardown is over: a leak may fail it.

    No hook of pytest can hold a report back, so its function that makes and logs reports is
    replaced. Plugins that run a test again call that too, and log the reports themselves.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._runner = _runner_of(config)
        self._found = self._runner.call_and_report
        self._ours = self._call_and_report
        self._runner.call_and_report = self._ours

    def remove(self) -> None:
        """Leave pytest as it was found; below a patch of another plugin, stay and do nothing."""
        if self._runner.call_and_report is self._ours:
            self._runner.call_and_report = self._found

    def fail(self, item: pytest.Item, failure: Failure) -> bool:
        """Make the report that of a failed test; False where the body has not passed.

        Other plugins see a body that has raised: one that is expected to fail has done so.
        """
        from closewait_guard.pytest_plugin._failing import set_crash_location

        report = item.stash.get(_BODY, None)
        if report is None:
            return False
        call = pytest.CallInfo.from_call(partial(pytest.fail, failure.text, pytrace=False), "call")
        failed = item.ihook.pytest_runtest_makereport(item=item, call=call)
        set_crash_location(failed, failure)
        times = {name: getattr(report, name) for name in ("start", "stop", "duration")}
        vars(report).clear()
        vars(report).update(vars(failed), **times)
        return True

    def _call_and_report(
        self,
        item: pytest.Item,
        when: str,
        log: bool = True,  # noqa: FBT002 - as pytest has it
        **arguments: Any,
    ) -> Any:
        # Another run may go on inside a test of this one.
        if item.config is not self._config or when == "setup":
            item.stash[_BODY] = None
            return self._found(item, when, log, **arguments)
        held = item.stash.get(_BODY, None)
        try:
            report = self._found(item, when, log=False, **arguments)
        finally:
            # Also where the teardown is stopped.
            _log_report(item, held, log=log)
        if when == "call" and _has_run_through(report):
            item.stash[_BODY] = report
        else:
            _log_report(item, report, log=log)
        return report


def _runner_of(config: pytest.Config) -> Any:
    return config.pluginmanager.get_plugin("runner")


def _log_report(item: pytest.Item, report: pytest.TestReport | None, *, log: bool) -> None:
    if log and report is not None:
        item.ihook.pytest_runtest_logreport(report=report)


def _has_run_through(report: pytest.TestReport) -> bool:
    """Whether the body has raised nothing: what is strictly expected to fail may yet do so."""
    reason = report.longrepr
    return report.passed or (isinstance(reason, str) and reason.startswith("[XPASS(strict)]"))
