"""The hooks around tests and fixtures, and the start of a run that asks for them."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from closewait_guard._config import project_file
from closewait_guard.pytest_plugin._attribution import (
    NOBODY,
    Owner,
    Ownership,
    WiderFixture,
    name_of,
)
from closewait_guard.pytest_plugin._collecting import FindingCollector
from closewait_guard.pytest_plugin._current_test import CurrentTest
from closewait_guard.pytest_plugin._lazy_start import (
    TEARDOWN,
    FirstSocketHook,
    IdlePlugin,
    SpareDescriptors,
)
from closewait_guard.pytest_plugin._options import Mode, Options, Plan, options_of, plan_of

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
    "begin",
]


_WITHOUT_SOCKETS = ("_pytest", "closewait_guard")


class BetweenPhases:
    """It is nobody's turn meanwhile. Apart, because hooks are dear in a suite of short tests."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, object, object]:
        with self._ownership.turn(NOBODY):
            return (yield)

    pytest_runtest_logreport = pytest_exception_interact = pytest_runtest_makereport


_BETWEEN = frozenset(name for name in vars(BetweenPhases) if name.startswith("pytest_"))


class TestPhases:
    """Begins the turn of each test; has it paused where other plugins act between the phases."""

    def __init__(self, watch: LeakHooks, plugins: pytest.PytestPluginManager) -> None:
        self._watch = watch
        self._plugins = plugins

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._watch.start(item)

    def pytest_plugin_registered(self, plugin: object) -> None:
        """Called for those too that have been registered before."""
        name = "closewait_guard_pauses"
        if not self._plugins.has_plugin(name) and self._acts_between(plugin):
            self._plugins.register(BetweenPhases(self._watch.ownership), name)

    def _acts_between(self, plugin: object) -> bool:
        home = getattr(plugin, "__name__", None) or type(plugin).__module__
        if str(home).partition(".")[0] in _WITHOUT_SOCKETS:
            return False
        callers = self._plugins.get_hookcallers(plugin) or ()
        return any(caller.name in _BETWEEN for caller in callers)


class CallPhase:
    """Notes of a test whether its body came to its end: asked where a marker allows leaks."""

    def __init__(self, watch: LeakHooks) -> None:
        self._watch = watch

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        result = yield
        if self._watch.running is not None:
            self._watch.running.called = True
        return result


_PLAN = pytest.StashKey[Plan]()


class LeakHooks:
    """Watches the tests of one process."""

    def __init__(
        self, config: pytest.Config, plan: Plan, settings: Settings | None, desk: FindingSink
    ) -> None:
        self._config = config
        self._plan = plan
        self._settings = settings
        self._desk = desk
        self.ownership = Ownership()
        self._reserve = SpareDescriptors()
        self._tripwire = FirstSocketHook(self._load)
        self._trial: RunRecorder | None = None
        self._keepers: list[WiderFixture] = []
        self.running: CurrentTest | None = None
        self._asleep: IdlePlugin | None = None
        self._phases: TestPhases | None = None
        self._outbox: PendingFindings | None = None
        self._began = self._planned = False

    def plan(self, items: Iterable[pytest.Item]) -> None:
        """Note which tests are to be watched in another way than all."""
        self._planned = True
        for item in items:
            item.stash[_PLAN] = plan_of(item, self._plan)
        self._wake()

    def watched(self, item: pytest.Item) -> Guard:
        """The guard, once it watches this test, be it from now on only."""
        if self.running is None:
            self.start(item, plan_of(item, self._plan)._replace(mode=Mode.FAIL))
        return self._load().guard()

    def start(self, item: pytest.Item, plan: Plan | None = None) -> None:
        """The set-up of a test begins."""
        if plan is None:
            plan = item.stash.get(_PLAN, self._plan) if self._planned else self._plan
        if not self._began:
            if plan.mode is Mode.OFF:
                return
            self._begin()
        else:
            self._reserve.lay_up()
        if plan.allowed is not None:
            self._follow_bodies()
        nodeid = item.nodeid
        owner = self._new_owner(nodeid, nodeid)
        self.running = CurrentTest(item, plan, owner)
        self.ownership.turn_of(owner)

    def _follow_bodies(self) -> None:
        plugins = self._config.pluginmanager
        if not plugins.has_plugin("closewait_guard_bodies"):
            plugins.register(CallPhase(self), "closewait_guard_bodies")

    def end(self) -> None:
        """Leave everything as it was found."""
        if self._began:
            self._began = False
            if self._asleep is not None:
                self._asleep.end()
            self.ownership.end()
            if self._trial is not None:
                self._trial.end()
            # After the guard, which may have been put over the wire.
            self._tripwire.take_down()
            self._reserve.give_up()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        if self._plan.mode is not Mode.OFF:
            self._asleep = IdlePlugin(self._config, self._wake)
            self._begin()

    def _wake(self) -> None:
        """With the first socket, thread or marker: from now on, whose turn it is matters."""
        if self._phases is None:
            self._phases = TestPhases(self, self._config.pluginmanager)
            self._config.pluginmanager.register(self._phases, "closewait_guard_phases")
        asleep, self._asleep = self._asleep, None
        if asleep is None:
            return
        asleep.end()
        item, phase = asleep.item, asleep.phase()
        if item is not None and phase is not None:
            owner = self._new_owner(item.nodeid, item.nodeid)
            self.running = CurrentTest(item, self._plan, owner)
            self.running.in_teardown = phase == TEARDOWN
            self.ownership.take_over(owner)

    def _begin(self) -> None:
        self._began = True
        self._reserve.lay_up()
        self.ownership.begin()
        if self._trial is None:
            self._tripwire.put_up()
        else:
            self._trial.begin()

    def _load(self) -> RunRecorder:
        from closewait_guard.pytest_plugin._recording import RunRecorder

        self._tripwire.take_down()
        if self._trial is None:
            worker = getattr(self._config, "workerinput", {}).get("workerid")
            callers = _callers(self._config)
            self._trial = RunRecorder(
                self._plan, self._settings, self.ownership, self._reserve, worker, callers
            )
        # Apart: a timeout may strike in between, and what has begun must be ended.
        self._trial.begin()
        self._wake()
        return self._trial

    def _new_owner(self, name: str, nodeid: str) -> Owner:
        return self.ownership.new(name, nodeid, 0 if self._trial is None else self._trial.mark())

    def pytest_keyboard_interrupt(self) -> None:
        """The run stops, also by `pytest.exit`: the rest of the test's phases is left out."""
        self.ownership.turn_of(NOBODY)

    def pytest_exception_interact(self, call: pytest.CallInfo[Any]) -> None:
        if self.running is not None and call.excinfo is not None:
            self.running.failures += (call.excinfo.value,)

    # Innermost, so that output is still captured while sockets settle.
    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_teardown(self) -> Generator[None, None, None]:
        if self.running is not None:
            self.running.in_teardown = True
        try:
            yield
        except (KeyboardInterrupt, SystemExit, pytest.exit.Exception):
            raise
        except BaseException as error:
            if (running := self.running) is not None:
                running.failures += (error,)
                if failure := self._conclude(running):
                    running.item.add_report_section("teardown", "socket leaks", failure.text)
            raise
        # It may have begun to be watched in its teardown.
        if (running := self.running) is not None and (failure := self._conclude(running)):
            self._out().fail(running.item.nodeid, failure)

    def _conclude(self, running: CurrentTest) -> Failure | None:
        """Check the test if that has not been done yet; what to fail it with."""
        self._check(running)
        running.owner.over = True
        self.running = None
        self.ownership.turn_of(NOBODY)
        if self._plan.mode is Mode.OFF:
            self.end()
        return running.failure

    def _check(self, running: CurrentTest) -> None:
        if running.checked:
            return
        running.checked = True
        trial = self._trial
        if trial is None or trial.all_closed_since(running.owner.mark):
            finding = None
            self.ownership.forget(running.owner)
        else:
            finding = trial.of_test(running, self._keepers)
        if finding is not None:
            self._out().put(finding)
            running.take(finding)
        elif running.plan.allowed is not None and running.has_ended_well():
            self._out().put(running.unused_waiver())

    def _out(self) -> PendingFindings:
        if self._outbox is None:
            self._reserve.give_up()
            from closewait_guard.pytest_plugin._failing import PendingFindings

            self._outbox = PendingFindings(self._config, self._desk)
        return self._outbox

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        if fixturedef.scope == "function" or not self._began:
            return (yield)
        owner = self._new_owner(name_of(fixturedef, request), request.node.nodeid)
        keeper = WiderFixture(owner, fixturedef, request)
        turn = ExitStack()
        fixturedef.addfinalizer(partial(self._end_fixture, keeper, turn))
        with self.ownership.turn(owner):
            value = yield
        keeper.set_up()
        self._keepers.append(keeper)
        self._keepers.sort(key=lambda each: each.rank)
        fixturedef.addfinalizer(partial(self._begin_to_finish, keeper, turn))
        return value

    def _begin_to_finish(self, keeper: WiderFixture, turn: ExitStack) -> None:
        """The first of a fixture's finalizers: a test that is over is checked before it goes."""
        if self.running is not None and self.running.in_teardown:
            self._check(self.running)
        turn.enter_context(self.ownership.turn(keeper.owner))

    def _end_fixture(self, keeper: WiderFixture, turn: ExitStack) -> None:
        """The last of a fixture's finalizers: whatever it has not closed by now, it leaks."""
        turn.close()
        if keeper in self._keepers:
            self._keepers.remove(keeper)
        keeper.owner.over = True
        if self._trial is None or not self._began:
            return
        finding = self._trial.of_fixture(keeper, self._keepers)
        if finding is not None:
            self._out().put(finding)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Tell of fixtures that a stopped run finishes, and of tests that leaked later."""
        self._reserve.give_up()
        leftovers: list[OwnerFinding] = []
        if self._began and self._trial is not None and exitstatus != pytest.ExitCode.INTERRUPTED:
            leftovers += self._trial.of_leftovers()
        if leftovers or self._outbox is not None:
            self._out().late(session, leftovers)


def _callers(config: pytest.Config) -> list[Any]:
    """The code of whatever calls tests and fixtures: what is further out is pytest's business."""
    hook = config.hook
    callers = (hook.pytest_pyfunc_call, hook.pytest_fixture_setup, hook.pytest_runtest_call)
    functions = (each.function for caller in callers for each in caller.get_hookimpls())
    return [function.__code__ for function in functions if hasattr(function, "__code__")]


_WATCH = pytest.StashKey[LeakHooks]()


def begin(config: pytest.Config) -> LeakHooks:
    """The watch of this run, made at the first call."""
    if _WATCH in config.stash:
        return config.stash[_WATCH]
    options, settings = options_of(config), _given_settings()
    desk = _desk(config, options, settings.notes if settings is not None else ())
    watch = config.stash[_WATCH] = LeakHooks(config, options.plan, settings, desk)
    config.add_cleanup(watch.end)
    # Where pytest-xdist has others run the tests, there is nothing to watch.
    if not config.pluginmanager.has_plugin("dsession"):
        config.pluginmanager.register(watch, "closewait_guard_watch")
        if any(map(config.pluginmanager.has_plugin, ("anyio", "anyio.pytest_plugin"))):
            from closewait_guard.pytest_plugin._attribution import AnyioOwner

            config.pluginmanager.register(AnyioOwner(watch.ownership))
    return watch


def _desk(config: pytest.Config, options: Options, notes: tuple[str, ...]) -> FindingSink:
    if hasattr(config, "workerinput"):
        from closewait_guard.pytest_plugin._collecting import XdistSender

        return XdistSender()
    ledger = FindingCollector(config, options, notes)
    config.pluginmanager.register(ledger, "closewait_guard_ledger")
    return ledger


def _given_settings() -> Settings | None:
    """The settings, if anything but the defaults is asked for. Complains of what cannot be used."""
    prefix, plugin = "CLOSEWAIT_GUARD_", "CLOSEWAIT_GUARD_SOCKET_LEAKS"
    given = (name for name in os.environ if name.startswith(prefix))
    if all(name.startswith(plugin) for name in given) and not _is_in_pyproject():
        return None
    from closewait_guard.exceptions import ConfigurationError
    from closewait_guard.settings import Settings

    try:
        return Settings.load()
    except ConfigurationError as error:
        raise pytest.UsageError(str(error)) from error


def _is_in_pyproject() -> bool:
    file = project_file(Path())
    return file is not None and file.may_have_settings
