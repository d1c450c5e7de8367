"""The births of a run, and the quick look that most tests and fixtures get by with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import TYPE_CHECKING

from closewait_guard._capture import PlainContext, Registry, capture_up_to
from closewait_guard._config import RECORDING_DEFAULTS
from closewait_guard.pytest_plugin._attribution import Ownership, WiderFixture
from closewait_guard.pytest_plugin._current_test import CurrentTest
from closewait_guard.pytest_plugin._lazy_start import SpareDescriptors
from closewait_guard.pytest_plugin._options import Plan

if TYPE_CHECKING:
    from closewait_guard._enums import Scalar
    from closewait_guard._guard import Guard
    from closewait_guard.pytest_plugin._checker import LeakChecker
    from closewait_guard.pytest_plugin._findings import OwnerFinding
    from closewait_guard.settings import Settings

__all__ = [
    "RunRecorder",
]


# The records of dropped sockets must last until their owners are checked.
_DROPPED_KEPT = 100_000


class _OwnersContext(PlainContext):
    """Whose a birth is, and what else the program wants known: plain already, and never changed."""

    def __init__(self, ownership: Ownership, further: PlainContext | None) -> None:
        super().__init__(ownership.in_thread)
        self._ownership = ownership
        self._further = further

    @property
    def provider(self) -> Callable[[], dict[str, Scalar] | None]:
        if self._further is None:
            return self._ownership.in_context
        owners, others = self._ownership, self._further.provider
        return lambda: {**(others() or {}), **(owners.in_context() or owners.in_thread())}

    @property
    def fallback_provider(self) -> Callable[[], dict[str, Scalar]]:
        return self._ownership.in_thread


class RunRecorder:
    """Records the births of a run. Its guard, and who hears the suspects, come with the first.

    Args:
        plan: That of a test without markers, and of fixtures.
        settings: Those that are given, if any are.
        ownership: Who owns what.
        reserve: Given up as soon as there is a suspect.
        worker: The name of this process, if it is one of pytest-xdist's.
        callers: Where pytest calls tests and fixtures: stacks end there.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings | None,
        ownership: Ownership,
        reserve: SpareDescriptors,
        worker: str | None,
        callers: Iterable[CodeType],
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._ownership = ownership
        self._reserve = reserve
        self._worker = worker
        recording = settings or RECORDING_DEFAULTS
        self._registry = Registry(
            recording.stack_depth,
            _OwnersContext(ownership, PlainContext.of(recording.context)),
            max(recording.dropped_kept, _DROPPED_KEPT),
            capture_up_to(callers),
        )
        self._guard: Guard | None = None
        self._hearing: LeakChecker | None = None
        # Asked around every test.
        self.mark = self._registry.last_serial
        self.all_closed_since = self._registry.all_closed_since
        self._mark = self.mark()

    def begin(self) -> None:
        """Record births from now on."""
        if self._guard is None:
            self._registry.subscribe()
        else:
            self._guard.install()

    def end(self) -> None:
        """Record no more."""
        if self._guard is None:
            self._registry.unsubscribe()
        else:
            self._guard.uninstall()

    def guard(self) -> Guard:
        """Looks at what was recorded, and goes on recording. Most runs never need it."""
        if self._guard is None:
            from closewait_guard._guard import Guard
            from closewait_guard.settings import Settings

            # The program's own reporters and its signal are for its own guard.
            settings = (self._settings or Settings()).replaced(reporters=(), signal=None)
            self._guard = Guard(settings, registry=self._registry)
        return self._guard.install()

    def _heard(self) -> LeakChecker:
        self._reserve.give_up()
        if self._hearing is None:
            from closewait_guard.pytest_plugin._checker import LeakChecker

            self._hearing = LeakChecker(self.guard(), self._ownership, self._plan, self._worker)
        return self._hearing

    def of_test(self, running: CurrentTest, keepers: Sequence[WiderFixture]) -> OwnerFinding | None:
        """What a test has left behind at its end, if it has not closed all."""
        return self._heard().of_test(running, keepers)

    def of_fixture(
        self, keeper: WiderFixture, keepers: Sequence[WiderFixture]
    ) -> OwnerFinding | None:
        """What a wider fixture has left behind when it is finalized."""
        if self.all_closed_since(keeper.owner.mark):
            return None
        return self._heard().of_fixture(keeper, keepers)

    def of_leftovers(self) -> Iterable[OwnerFinding]:
        """What tests have left behind after they had been looked at: their threads, for example."""
        if self.all_closed_since(self._mark):
            return ()
        return self._heard().of_leftovers(self._mark)
