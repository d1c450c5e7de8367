"""Look at what one owner has left behind: hand over what others keep, excuse, settle, accuse.

From what an inspection shows to what is found of a test or a fixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from closewait_guard._capture import Creation
from closewait_guard._clock import now, pause
from closewait_guard._guard import Guard
from closewait_guard._inspect import resolve
from closewait_guard._no_leaks import Settling
from closewait_guard.pytest_plugin._attribution import (
    NOBODY,
    OPENED_IN,
    Owner,
    Ownership,
    WiderFixture,
)
from closewait_guard.pytest_plugin._current_test import CurrentTest
from closewait_guard.pytest_plugin._excuses import (
    IdleEventLoops,
    is_ignored,
    is_of_default_loop,
    locals_of_tracebacks,
    reachable,
)
from closewait_guard.pytest_plugin._findings import Outcome, OwnerFinding
from closewait_guard.pytest_plugin._options import Mode, Plan

if TYPE_CHECKING:
    from closewait_guard.model import Finding, Report

__all__ = [
    "CheckContext",
    "Inspector",
    "LeakChecker",
    "Result",
]


class CheckContext(NamedTuple):
    """What an inspection has to take into account.

    Attributes:
        keepers: The wider fixtures that stay, the widest first.
        failures: The exceptions whose tracebacks are kept for who debugs them.
        own_calls: Files and names of the test's own functions; what was opened below one is its own
            even if a runner of a wider fixture carried it out.
    """

    plan: Plan
    keepers: Sequence[WiderFixture] = ()
    failures: Callable[[], Sequence[BaseException]] = tuple
    own_calls: Callable[[], frozenset[tuple[str, str]]] = frozenset


class Result(NamedTuple):
    """What is left of the suspects, if anything, and how long it took them to settle."""

    report: Report | None
    waited: float


class Inspector:
    """Accuses each socket once: what has been told, excused or allowed is nobody's afterwards."""

    def __init__(self, guard: Guard, ownership: Ownership) -> None:
        self._guard = guard
        self._ownership = ownership
        self._done: set[int] = set()
        self._moved: dict[int, Owner] = {}

    def inspect(self, owner: Owner, around: CheckContext) -> Result | None:
        """What `owner` has leaked; None when nothing was suspect at all."""
        births = self._births_of(owner, around)
        if not births:
            return None
        births = self._not_handed_over(births, around.keepers)
        suspects = self._not_excused(owner, births, around)
        if not suspects:
            return None
        began = now()
        settling = Settling(lambda: self._still_open(owner, suspects), around.plan.grace)
        turns = IdleEventLoops(_targets(births))
        for wait in settling:
            turns()
            pause(wait)
        waited = now() - began
        # Only now is it asked who holds them, which goes through the whole heap.
        report = self._check(owner, suspects) if settling.findings else None
        self._done |= suspects
        return Result(report, waited)

    def adopt(self, owner: Owner) -> None:
        """Accuse nobody of what this owner has left behind so far."""
        self._done |= {birth.serial for birth in self._births_of(owner, CheckContext(Plan()))}

    def owners_of_leftovers(self, since: int) -> list[Owner]:
        """Whose sockets, opened after a mark, are open or were dropped without being told."""
        left = (
            birth for birth in self._guard._open_creations(since) if birth.serial not in self._done
        )
        return list(dict.fromkeys(self._owner_of(birth) for birth in left))

    def _owner_of(self, birth: Creation) -> Owner:
        return self._moved.get(birth.serial) or self._ownership.called(_born_in(birth))

    def _births_of(self, owner: Owner, around: CheckContext) -> list[Creation]:
        unfinished = self._guard._open_creations(owner.mark)
        births = [birth for birth in unfinished if birth.serial not in self._done]
        foreign = [birth for birth in births if self._owner_of(birth) is not owner]
        if foreign:
            calls = around.own_calls()
            self._moved |= {birth.serial: owner for birth in foreign if _is_below(birth, calls)}
        return [birth for birth in births if self._owner_of(birth) is owner]

    def _not_handed_over(
        self, births: list[Creation], keepers: Iterable[WiderFixture]
    ) -> list[Creation]:
        """Give each socket that a wider fixture keeps to that fixture."""
        for keeper in keepers:
            if not births:
                break
            kept = reachable(keeper.roots(), _targets(births))
            self._moved |= dict.fromkeys(kept, keeper.owner)
            births = [birth for birth in births if birth.serial not in kept]
        return births

    def _not_excused(self, owner: Owner, births: list[Creation], around: CheckContext) -> set[int]:
        if not births:
            return set()
        excused = reachable(locals_of_tracebacks(around.failures()), _targets(births))
        suspects = {birth.serial for birth in births}
        for leak in self._still_open(owner, suspects):
            record = leak.observation.record
            if is_ignored(record, around.plan.ignore) or is_of_default_loop(record):
                excused.add(record.serial)
        self._done |= excused
        return suspects - excused

    def _still_open(self, owner: Owner, suspects: set[int]) -> tuple[Finding, ...]:
        return _only(suspects, self._guard._open_since(owner.mark))

    def _check(self, owner: Owner, suspects: set[int]) -> Report | None:
        report = self._guard.check(owner.mark)
        findings = _only(suspects, report.findings)
        return replace(report, findings=findings) if findings else None


def _only(suspects: set[int], findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(each for each in findings if each.observation.record.serial in suspects)


def _born_in(birth: Creation) -> object:
    """By its birth: that of the descriptor, where it was wrapped later."""
    while birth.parent is not None and birth.origin in _SAME_DESCRIPTOR:
        birth = Creation._make(birth.parent)
    return birth.context.get(OPENED_IN)


_SAME_DESCRIPTOR = frozenset({"wrapped", "detached", "inherited"})


def _targets(births: Iterable[Creation]) -> dict[int, int]:
    """The sockets that are alive, by the address of the object."""
    return {birth.object_id: birth.serial for birth in births if birth.sock() is not None}


def _is_below(birth: Creation, calls: frozenset[tuple[str, str]]) -> bool:
    return bool(calls) and any(
        (frame.filename, frame.function) in calls for frame in resolve(birth.stack)
    )


# What is worth telling of a test whose sockets were closed in time.
_LONG_SETTLE = 0.01


class LeakChecker:
    """Hears whoever has left a socket behind, and says what is found.

    Args:
        guard: Knows the sockets.
        ownership: Who owns what.
        plan: That of fixtures, and of tests that are over.
        worker: The name of this process, if it is one of pytest-xdist's.
    """

    def __init__(self, guard: Guard, ownership: Ownership, plan: Plan, worker: str | None) -> None:
        self._inspector = Inspector(guard, ownership)
        self._plan = plan
        self._worker = worker

    def of_test(self, running: CurrentTest, keepers: Sequence[WiderFixture]) -> OwnerFinding | None:
        """What a test has left behind at its end."""
        owner, plan = running.owner, running.plan
        if plan.mode is Mode.OFF:
            self._inspector.adopt(owner)
            return None
        around = CheckContext(plan, keepers, running.all_failures, running.own_calls)
        return self._finding(owner, around, "test")

    def of_fixture(
        self, keeper: WiderFixture, keepers: Sequence[WiderFixture]
    ) -> OwnerFinding | None:
        """What a wider fixture has left behind when it is finalized."""
        if self._plan.mode is Mode.OFF:
            self._inspector.adopt(keeper.owner)
            return None
        around = CheckContext(self._plan, keepers, keeper.failures)
        return self._finding(keeper.owner, around, "fixture")

    def of_leftovers(self, since: int) -> Iterator[OwnerFinding]:
        """What tests have left behind, opened after a mark, and after they had been looked at."""
        for owner in self._inspector.owners_of_leftovers(since):
            if owner is not NOBODY and self._plan.mode is not Mode.OFF:
                finding = self._finding(owner, CheckContext(self._plan), "test")
                if finding is not None:
                    yield finding

    def _finding(self, owner: Owner, around: CheckContext, kind: str) -> OwnerFinding | None:
        result = self._inspector.inspect(owner, around)
        if result is None:
            return None
        leaked = result.report is not None
        if not leaked and (result.waited < _LONG_SETTLE or around.plan.allowed):
            return None
        return OwnerFinding(
            owner=owner.name,
            nodeid=owner.nodeid,
            kind=kind,
            outcome=_outcome(around.plan) if leaked else Outcome.SETTLED,
            waited=result.waited,
            reason=around.plan.allowed,
            report=result.report,
            worker=self._worker,
        )


def _outcome(plan: Plan) -> Outcome:
    if plan.allowed is not None:
        return Outcome.ALLOWED
    return Outcome.FAILED if plan.mode is Mode.FAIL else Outcome.WARNED
