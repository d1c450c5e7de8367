"""The hooks around tests and fixtures: whose turn it is, and when to look.

Nothing of the guard is imported here before a socket is born.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from closewait_guard.pytest_plugin.asleep import TEARDOWN, Asleep
from closewait_guard.pytest_plugin.keepers import Keeper, name_of
from closewait_guard.pytest_plugin.options import Mode, Plan, plan_of
from closewait_guard.pytest_plugin.ownership import NOBODY, Owner, Ownership
from closewait_guard.pytest_plugin.phases import Bodies, Phases
from closewait_guard.pytest_plugin.reserve import Reserve
from closewait_guard.pytest_plugin.running import Running
from closewait_guard.pytest_plugin.tripwire import Tripwire

if TYPE_CHECKING:
    from closewait_guard._guard import Guard
    from closewait_guard.pytest_plugin.failure import Failure
    from closewait_guard.pytest_plugin.finding import Finding
    from closewait_guard.pytest_plugin.outbox import Desk, Outbox
    from closewait_guard.pytest_plugin.trial import Trial
    from closewait_guard.settings import Settings

__all__ = ["Watch"]

_PLAN = pytest.StashKey[Plan]()


class Watch:
    """Watches the tests of one process."""

    def __init__(
        self, config: pytest.Config, plan: Plan, settings: Settings | None, desk: Desk
    ) -> None:
        self._config = config
        self._plan = plan
        self._settings = settings
        self._desk = desk
        self.ownership = Ownership()
        self._reserve = Reserve()
        self._tripwire = Tripwire(self._load)
        self._trial: Trial | None = None
        self._keepers: list[Keeper] = []
        self.running: Running | None = None
        self._asleep: Asleep | None = None
        self._phases: Phases | None = None
        self._outbox: Outbox | None = None
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
        self.running = Running(item, plan, owner)
        self.ownership.turn_of(owner)

    def _follow_bodies(self) -> None:
        plugins = self._config.pluginmanager
        if not plugins.has_plugin("closewait_guard_bodies"):
            plugins.register(Bodies(self), "closewait_guard_bodies")

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
            self._asleep = Asleep(self._config, self._wake)
            self._begin()

    def _wake(self) -> None:
        """With the first socket, thread or marker: from now on, whose turn it is matters."""
        if self._phases is None:
            self._phases = Phases(self, self._config.pluginmanager)
            self._config.pluginmanager.register(self._phases, "closewait_guard_phases")
        asleep, self._asleep = self._asleep, None
        if asleep is None:
            return
        asleep.end()
        item, phase = asleep.item, asleep.phase()
        if item is not None and phase is not None:
            owner = self._new_owner(item.nodeid, item.nodeid)
            self.running = Running(item, self._plan, owner)
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

    def _load(self) -> Trial:
        from closewait_guard.pytest_plugin.trial import Trial

        self._tripwire.take_down()
        if self._trial is None:
            worker = getattr(self._config, "workerinput", {}).get("workerid")
            callers = _callers(self._config)
            self._trial = Trial(
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

    def _conclude(self, running: Running) -> Failure | None:
        """Check the test if that has not been done yet; what to fail it with."""
        self._check(running)
        running.owner.over = True
        self.running = None
        self.ownership.turn_of(NOBODY)
        if self._plan.mode is Mode.OFF:
            self.end()
        return running.failure

    def _check(self, running: Running) -> None:
        if running.checked:
            return
        running.checked = True
        trial = self._trial
        if trial is None or trial.has_closed_all(running.owner.mark):
            finding = None
            self.ownership.forget(running.owner)
        else:
            finding = trial.of_test(running, self._keepers)
        if finding is not None:
            self._out().put(finding)
            running.take(finding)
        elif running.plan.allowed is not None and running.has_ended_well():
            self._out().put(running.unused_waiver())

    def _out(self) -> Outbox:
        if self._outbox is None:
            self._reserve.give_up()
            from closewait_guard.pytest_plugin.outbox import Outbox

            self._outbox = Outbox(self._config, self._desk)
        return self._outbox

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        if fixturedef.scope == "function" or not self._began:
            return (yield)
        owner = self._new_owner(name_of(fixturedef, request), request.node.nodeid)
        keeper = Keeper(owner, fixturedef, request)
        turn = ExitStack()
        fixturedef.addfinalizer(partial(self._end_fixture, keeper, turn))
        with self.ownership.turn(owner):
            value = yield
        keeper.set_up()
        self._keepers.append(keeper)
        self._keepers.sort(key=lambda each: each.rank)
        fixturedef.addfinalizer(partial(self._begin_to_finish, keeper, turn))
        return value

    def _begin_to_finish(self, keeper: Keeper, turn: ExitStack) -> None:
        """The first of a fixture's finalizers: a test that is over is checked before it goes."""
        if self.running is not None and self.running.in_teardown:
            self._check(self.running)
        turn.enter_context(self.ownership.turn(keeper.owner))

    def _end_fixture(self, keeper: Keeper, turn: ExitStack) -> None:
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
        leftovers: list[Finding] = []
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
