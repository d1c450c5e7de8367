"""From what an inspection shows to what is found of a test or a fixture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from closewait_guard._guard import Guard
from closewait_guard.pytest_plugin.finding import Finding, Outcome
from closewait_guard.pytest_plugin.inspection import Circumstances, Inspector
from closewait_guard.pytest_plugin.keepers import Keeper
from closewait_guard.pytest_plugin.options import Mode, Plan
from closewait_guard.pytest_plugin.ownership import NOBODY, Owner, Ownership
from closewait_guard.pytest_plugin.running import Running

__all__ = ["Hearing"]

# What is worth telling of a test whose sockets were closed in time.
_LONG_SETTLE = 0.01


class Hearing:
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

    def of_test(self, running: Running, keepers: Sequence[Keeper]) -> Finding | None:
        """What a test has left behind at its end."""
        owner, plan = running.owner, running.plan
        if plan.mode is Mode.OFF:
            self._inspector.adopt(owner)
            return None
        around = Circumstances(plan, keepers, running.all_failures, running.own_calls)
        return self._finding(owner, around, "test")

    def of_fixture(self, keeper: Keeper, keepers: Sequence[Keeper]) -> Finding | None:
        """What a wider fixture has left behind when it is finalized."""
        if self._plan.mode is Mode.OFF:
            self._inspector.adopt(keeper.owner)
            return None
        around = Circumstances(self._plan, keepers, keeper.failures)
        return self._finding(keeper.owner, around, "fixture")

    def of_leftovers(self, since: int) -> Iterator[Finding]:
        """What tests have left behind, born after a mark, and after they had been looked at."""
        for owner in self._inspector.owners_of_leftovers(since):
            if owner is not NOBODY and self._plan.mode is not Mode.OFF:
                finding = self._finding(owner, Circumstances(self._plan), "test")
                if finding is not None:
                    yield finding

    def _finding(self, owner: Owner, around: Circumstances, kind: str) -> Finding | None:
        result = self._inspector.inspect(owner, around)
        if result is None:
            return None
        leaked = bool(result.report.leaks)
        if not leaked and (result.waited < _LONG_SETTLE or around.plan.allowed):
            return None
        return Finding(
            owner=owner.name,
            nodeid=owner.nodeid,
            kind=kind,
            outcome=_outcome(around.plan) if leaked else Outcome.SETTLED,
            waited=result.waited,
            reason=around.plan.allowed,
            report=result.report if leaked else None,
            worker=self._worker,
        )


def _outcome(plan: Plan) -> Outcome:
    if plan.allowed is not None:
        return Outcome.ALLOWED
    return Outcome.FAILED if plan.mode is Mode.FAIL else Outcome.WARNED
