"""pytest's hooks around tests and fixtures, and their registration in a run that asks for them."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from closewait_guard._descriptors import SpareDescriptors
from closewait_guard.pytest_plugin._attribution import (
    NO_OWNER,
    AnyioOwner,
    Owner,
    Ownership,
    WiderFixture,
    fixture_name,
)
from closewait_guard.pytest_plugin._collecting import FindingCollector, XdistSender
from closewait_guard.pytest_plugin._current_test import BodyReports, CurrentTest
from closewait_guard.pytest_plugin._lazy_start import (
    TEARDOWN,
    FirstSocketHook,
    IdlePlugin,
    note_variables,
)
from closewait_guard.pytest_plugin._options import (
    Mode,
    Options,
    Plan,
    load_settings,
    plan_for,
    read_options,
)

if TYPE_CHECKING:
    from closewait_guard._guard import Guard
    from closewait_guard.pytest_plugin._failing import Failure, FindingSink, PendingFindings
    from closewait_guard.pytest_plugin._findings import OwnerFinding
    from closewait_guard.pytest_plugin._recording import RunRecorder
    from closewait_guard.settings import Settings

__all__ = [
    "CallPhase",
    "LeakHooks",
    "TestPhases",
    "register_hooks",
]


_PLAN = pytest.StashKey[Plan]()


class LeakHooks:
    """Checks the tests and the wider fixtures of one process."""

    def __init__(
        self, config: pytest.Config, options: Options, settings: Settings | None, sink: FindingSink
    ) -> None:
        self._config = config
        self._plan = options.plan
        self._body_reports = BodyReports(config) if options.fails_tests else None
        self._settings = settings
        self._sink = sink
        self.ownership = Ownership()
        self._spare_descriptors = SpareDescriptors()
        self._noted: dict[str, dict[str, int]] = {}
        self._first_socket_hook = FirstSocketHook(self._make_recorder, self._load_recorder)
        self._recorder: RunRecorder | None = None
        self._wider_fixtures: list[WiderFixture] = []
        self.current_test: CurrentTest | None = None
        self._idle_plugin: IdlePlugin | None = None
        self._test_phases: TestPhases | None = None
        self._pending: PendingFindings | None = None
        self._has_begun = self._has_plans = False

    def plan_tests(self, items: Iterable[pytest.Item]) -> None:
        """Note for each test what its markers ask for."""
        self._has_plans = True
        for item in items:
            item.stash[_PLAN] = plan_for(item, self._plan)
        self._wake()

    def guard_for(self, item: pytest.Item) -> Guard:
        """The guard. A test that is not checked yet is from now on."""
        if self.current_test is None:
            self.start_test(item, plan_for(item, self._plan)._replace(mode=Mode.FAIL))
        return self._load_recorder().guard()

    def is_checking(self, item: pytest.Item) -> bool:
        """Whether this test is checked."""
        return item.stash.get(_PLAN, self._plan).mode is not Mode.OFF

    def start_test(self, item: pytest.Item, plan: Plan | None = None) -> None:
        """Begin to check a test: its set-up begins, or is under way where its plan is given."""
        within_test = plan is not None
        if plan is None:
            plan = item.stash.get(_PLAN, self._plan) if self._has_plans else self._plan
        if not self._has_begun:
            if plan.mode is Mode.OFF:
                return
            self._begin(within_test=within_test)
        else:
            self._spare_descriptors.acquire()
        if plan.allow_reason is not None:
            self._register_call_phase()
        nodeid = item.nodeid
        owner = self._new_owner(nodeid, nodeid)
        self.current_test = CurrentTest(item, plan, owner)
        self.ownership.set_current(owner)

    def _register_call_phase(self) -> None:
        plugins = self._config.pluginmanager
        if not plugins.has_plugin("closewait_guard_call_phase"):
            plugins.register(CallPhase(self), "closewait_guard_call_phase")

    def close(self) -> None:
        """Leave everything as it was found, for good."""
        self.end()
        if self._body_reports is not None:
            self._body_reports.remove()

    def end(self) -> None:
        """Record and check nothing more, until a test begins."""
        if self._has_begun:
            self._has_begun = False
            if self._idle_plugin is not None:
                self._idle_plugin.end()
            self.ownership.end()
            if self._recorder is not None:
                self._recorder.end()
            # After the guard, which may have patched over the hook.
            self._first_socket_hook.remove()
            self._spare_descriptors.release()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        if self._plan.mode is not Mode.OFF:
            self._idle_plugin = IdlePlugin(self._config, self._wake)
            self._begin(within_test=False)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> None:
        self._noted |= note_variables()

    def _wake(self) -> None:
        """With the first socket, thread or marker: from now on the owner matters."""
        if self._test_phases is None:
            self._test_phases = TestPhases(self, self._config.pluginmanager)
            self._config.pluginmanager.register(self._test_phases, "closewait_guard_test_phases")
        idle, self._idle_plugin = self._idle_plugin, None
        if idle is None:
            return
        idle.end()
        with self._spare_descriptors.lend():
            item, phase = idle.item, idle.find_phase()
        if item is not None and phase is not None:
            owner = self._new_owner(item.nodeid, item.nodeid)
            self.current_test = CurrentTest(item, self._plan, owner)
            self.current_test.in_teardown = phase == TEARDOWN
            self.ownership.reassign_current(owner)

    def _begin(self, *, within_test: bool) -> None:
        self._has_begun = True
        self._spare_descriptors.acquire()
        self.ownership.begin(within_test=within_test)
        if self._recorder is None:
            self._first_socket_hook.install()
        else:
            self._recorder.begin()

    def _make_recorder(self) -> RunRecorder:
        with self._spare_descriptors.lend():
            from closewait_guard.pytest_plugin._recording import RunRecorder

        if self._recorder is None:
            worker = getattr(self._config, "workerinput", {}).get("workerid")
            self._recorder = RunRecorder(
                self._plan,
                self._settings,
                self.ownership,
                self._spare_descriptors,
                self._noted,
                worker,
                lambda unraisable: unraisable.warn(self._config),
                self._config,
            )
        return self._recorder

    def _load_recorder(self) -> RunRecorder:
        recorder = self._make_recorder()
        self._first_socket_hook.remove()
        # Apart: a timeout may strike in between, and what has begun must be ended.
        recorder.begin()
        self._wake()
        recorder.record_unfinished()
        return recorder

    def _new_owner(self, name: str, nodeid: str) -> Owner:
        return self.ownership.make_owner(
            name, nodeid, 0 if self._recorder is None else self._recorder.mark()
        )

    def pytest_keyboard_interrupt(self) -> None:
        """The run stops, also by `pytest.exit`: the rest of the test's phases is left out."""
        self.ownership.set_current(NO_OWNER)

    def pytest_exception_interact(self, call: pytest.CallInfo[Any]) -> None:
        if self.current_test is not None and call.excinfo is not None:
            self.current_test.failures += (call.excinfo.value,)

    # Innermost, so that output is still captured while sockets settle. An old-style wrapper leaves
    # no call of ours in the traceback of what is raised below it.
    @pytest.hookimpl(hookwrapper=True, trylast=True)
    def pytest_runtest_teardown(self) -> Generator[None, Any, None]:
        if self.current_test is not None:
            self.current_test.in_teardown = True
        outcome = yield
        stops = (KeyboardInterrupt, SystemExit, pytest.exit.Exception)
        # The check of a test may begin in its teardown.
        if self.current_test is None or isinstance(outcome.exception, stops):
            return
        try:
            self._end_teardown(self.current_test, outcome)
        except BaseException as error:
            outcome.force_exception(error)

    def _end_teardown(self, test: CurrentTest, outcome: Any) -> None:
        error = outcome.exception
        if error is not None:
            test.failures += (error,)
        failure, unraisable = self._finish_test(test), test.take_unraisable()
        if unraisable is not None and failure is None and error is None:
            outcome.force_exception(unraisable)
            return
        has_failed_body = failure is not None and self._fail_body(test, failure)
        # Only now: the report of the body would show it, too.
        test.add_section(unraisable)
        if failure is None or has_failed_body:
            return
        if error is not None:
            test.item.add_report_section("teardown", "socket leaks", failure.text)
        else:
            outcome.force_exception(
                self._ensure_pending().make_exception(test.item.nodeid, failure)
            )

    def _fail_body(self, test: CurrentTest, failure: Failure) -> bool:
        """Have the test itself fail, if that is asked for and it has passed so far."""
        reports = self._body_reports
        return reports is not None and reports.fail(test.item, failure)

    def _finish_test(self, test: CurrentTest) -> Failure | None:
        """Check the test if that has not been done yet; return what to fail it with."""
        self._check_test(test)
        test.owner.finished = True
        self.current_test = None
        self.ownership.set_current(NO_OWNER)
        if self._plan.mode is Mode.OFF:
            self.end()
        return test.failure

    def _check_test(self, test: CurrentTest) -> None:
        if test.is_checked:
            return
        test.is_checked = True
        recorder = self._recorder
        if recorder is None or recorder.all_closed_since(test.owner.mark):
            findings = []
            self.ownership.forget(test.owner)
        else:
            test.may_have_collected = True
            findings = recorder.checker().check_test(test, self._wider_fixtures)
            self._have_deferred_checked(recorder)
        for finding in map(test.note_failure, findings):
            self._ensure_pending().add(finding)
            test.add_finding(finding)
        if findings:
            return
        if test.plan.allow_reason is not None and test.has_passed():
            self._ensure_pending().add(test.make_unused_waiver())

    def _have_deferred_checked(self, recorder: RunRecorder) -> None:
        checker = recorder.checker()
        if checker.has_deferred:
            self._ensure_pending().check_later = checker.check_deferred

    def _ensure_pending(self) -> PendingFindings:
        if self._pending is None:
            self._spare_descriptors.release()
            from closewait_guard.pytest_plugin._failing import PendingFindings

            self._pending = PendingFindings(self._config, self._sink)
        return self._pending

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, Any, None]:
        if fixturedef.scope == "function" or not self._has_begun:
            yield
            return
        owner = self._new_owner(fixture_name(fixturedef, request), request.node.nodeid)
        fixture = WiderFixture(owner, fixturedef, request)
        finalizing = ExitStack()
        fixturedef.addfinalizer(partial(self._after_finalizers, fixture, finalizing))
        with self.ownership.owned_by(owner):
            outcome = yield
        if outcome.exception is not None:
            return
        fixture.note_assignments()
        self._wider_fixtures.append(fixture)
        self._wider_fixtures.sort(key=lambda each: each.rank)
        fixturedef.addfinalizer(partial(self._before_finalizers, fixture, finalizing))

    def _before_finalizers(self, fixture: WiderFixture, finalizing: ExitStack) -> None:
        """The first of a fixture's finalizers: check a test that is over while it is there."""
        if self.current_test is not None and self.current_test.in_teardown:
            self._check_test(self.current_test)
        finalizing.enter_context(self.ownership.owned_by(fixture.owner))

    def _after_finalizers(self, fixture: WiderFixture, finalizing: ExitStack) -> None:
        """The last of a fixture's finalizers: what it has not closed by now, it leaks."""
        finalizing.close()
        if fixture in self._wider_fixtures:
            self._wider_fixtures.remove(fixture)
        fixture.owner.finished = True
        fixture.note_use(self.current_test.item if self.current_test else None)
        recorder = self._recorder
        if recorder is None or not self._has_begun:
            return
        if recorder.all_closed_since(fixture.owner.mark):
            return
        for finding in recorder.checker().check_fixture(fixture, self._wider_fixtures):
            self._ensure_pending().add(finding)
        self._have_deferred_checked(recorder)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Send what a stopped run has not sent, and what tests have leaked since their end."""
        self._spare_descriptors.release()
        leftovers: list[OwnerFinding] = []
        if exitstatus != pytest.ExitCode.INTERRUPTED:
            leftovers += self._check_leftovers()
        if leftovers or self._pending is not None:
            self._ensure_pending().flush_late(session, leftovers)

    def _check_leftovers(self) -> Iterable[OwnerFinding]:
        recorder = self._recorder
        if recorder is None or not self._has_begun:
            return ()
        if recorder.all_closed_since(recorder.first_mark):
            return ()
        return recorder.checker().check_leftovers(recorder.first_mark)


class TestPhases:
    """Starts each test; registers `BetweenPhases` where another plugin acts between its phases."""

    def __init__(self, hooks: LeakHooks, plugins: pytest.PytestPluginManager) -> None:
        self._hooks = hooks
        self._plugins = plugins

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._hooks.start_test(item)

    def pytest_plugin_registered(self, plugin: object) -> None:
        """Called also for those that were registered before."""
        name = "closewait_guard_between_phases"
        if not self._plugins.has_plugin(name) and self._has_hooks_between(plugin):
            self._plugins.register(BetweenPhases(self._hooks.ownership), name)

    def _has_hooks_between(self, plugin: object) -> bool:
        module = getattr(plugin, "__name__", None) or type(plugin).__module__
        if str(module).partition(".")[0] in _WITHOUT_SOCKETS:
            return False
        callers = self._plugins.get_hookcallers(plugin) or ()
        return any(caller.name in _BETWEEN_PHASES for caller in callers)


class BetweenPhases:
    """What plugins open for a report, between the phases of a test, has no owner.

    A plugin of its own, because more hooks slow a suite of short tests.
    """

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, object, object]:
        with self._ownership.owned_by(NO_OWNER):
            return (yield)

    pytest_runtest_logreport = pytest_exception_interact = pytest_runtest_makereport


_BETWEEN_PHASES = frozenset(name for name in vars(BetweenPhases) if name.startswith("pytest_"))
_WITHOUT_SOCKETS = ("_pytest", "closewait_guard")


class CallPhase:
    """Notes whether the body of a test came to its end; registered where a marker allows leaks."""

    def __init__(self, hooks: LeakHooks) -> None:
        self._hooks = hooks

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        result = yield
        if self._hooks.current_test is not None:
            self._hooks.current_test.has_run_body = True
        return result


_HOOKS = pytest.StashKey[LeakHooks]()


def register_hooks(config: pytest.Config) -> LeakHooks:
    """Register the hooks of this run, once; return them."""
    if _HOOKS in config.stash:
        return config.stash[_HOOKS]
    options, settings = read_options(config), load_settings()
    if options.baseline is not None:
        from closewait_guard.pytest_plugin._baseline_run import follow_baseline

        follow_baseline(config, options)
    sink = _make_sink(config, options, settings.notes if settings is not None else ())
    hooks = config.stash[_HOOKS] = LeakHooks(config, options, settings, sink)
    config.add_cleanup(hooks.close)
    # Where workers of pytest-xdist run the tests, there is nothing to check.
    if not config.pluginmanager.has_plugin("dsession"):
        config.pluginmanager.register(hooks, "closewait_guard_hooks")
        if any(map(config.pluginmanager.has_plugin, ("anyio", "anyio.pytest_plugin"))):
            config.pluginmanager.register(AnyioOwner(hooks.ownership))
    return hooks


def _make_sink(config: pytest.Config, options: Options, notes: tuple[str, ...]) -> FindingSink:
    if hasattr(config, "workerinput"):
        return XdistSender()
    collector = FindingCollector(config, options, notes)
    config.pluginmanager.register(collector, "closewait_guard_collector")
    return collector
