"""From what an inspection shows to what is found of a test or a fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CodeType

from closewait_guard._context import PlainContext
from closewait_guard._guard import Guard
from closewait_guard._socket_values import Scalar
from closewait_guard.pytest_plugin.finding import Finding, Outcome
from closewait_guard.pytest_plugin.inspection import Circumstances, Inspector
from closewait_guard.pytest_plugin.keepers import Keeper
from closewait_guard.pytest_plugin.options import Mode, Plan
from closewait_guard.pytest_plugin.ownership import NOBODY, Owner, Ownership
from closewait_guard.pytest_plugin.running import Running
from closewait_guard.settings import Settings

__all__ = ["Trial"]

# The records of dropped sockets must last until their owners are checked.
_DROPPED_KEPT = 100_000

# What is worth telling of a test whose sockets were closed in time.
_LONG_SETTLE = 0.01


class _OwnersContext(PlainContext):
    """Hands on what is plain already, and never changes: a test may open many sockets."""

    @property
    def ask(self) -> Callable[[], dict[str, Scalar]]:
        return self._provider  # type: ignore[return-value]


class Trial:
    """The guard of a run, and what to make of the sockets that stay.

    Args:
        plan: That of a test without markers, and of fixtures.
        ownership: Who owns what.
        worker: The name of this process, if it is one of pytest-xdist's.
        callers: Where pytest calls tests and fixtures: stacks end there.
    """

    def __init__(
        self, plan: Plan, ownership: Ownership, worker: str | None, callers: Iterable[CodeType]
    ) -> None:
        self._plan = plan
        self._worker = worker
        settings = Settings.given(None)
        further = PlainContext.of(settings)
        ownership.further = further.ask if further is not None else None
        kept = max(settings.dropped_kept, _DROPPED_KEPT)
        # The program's own reporters and its signal are for its own guard.
        settings = settings.replaced(
            context=_OwnersContext(ownership.context), dropped_kept=kept, reporters=(), signal=None
        )
        self.guard = Guard(settings, ends_of_stacks=callers, lean=True)
        self._inspector = Inspector(self.guard, ownership)
        self._mark = self.guard.mark(natives=False)

    def of_test(self, running: Running, keepers: Sequence[Keeper]) -> Finding | None:
        """What a test has left behind at its end."""
        owner, plan = running.owner, running.plan
        if plan.mode is Mode.OFF:
            self._inspector.adopt(owner)
            return None
        if self.guard.has_closed_all(owner.mark):
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

    def of_leftovers(self) -> Iterator[Finding]:
        """What tests have left behind after they had been looked at: their threads, for example."""
        for owner in self._inspector.owners_of_leftovers(self._mark):
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
