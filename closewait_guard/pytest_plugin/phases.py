"""Each phase of a test is its turn; what lies between them is not.

What other plugins do between the phases, such as to pass on a report, is no part of the test.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import pytest

from closewait_guard.pytest_plugin.ownership import NOBODY, Ownership

if TYPE_CHECKING:
    from closewait_guard.pytest_plugin.watch import Watch

__all__ = ["EndOfPhase", "Phases"]


class Phases:
    """Begins the turns of set-up and body. That of the teardown ends with a look."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._ownership = watch.ownership

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        self._watch.start(item)
        try:
            return (yield)
        finally:
            self._ownership.turn_of(NOBODY)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        running = self._watch.running
        if running is None:
            return (yield)
        self._ownership.turn_of(running.owner)
        try:
            result = yield
            running.called = True
            return result
        finally:
            self._ownership.turn_of(NOBODY)


class EndOfPhase:
    """Ends the turn of the phase in which the first socket of a run is born: once.

    Args:
        phase: The name of that phase while it lasts. Subtests make reports in the middle of one.
    """

    def __init__(
        self,
        plugins: pytest.PytestPluginManager,
        ownership: Ownership,
        phase: Callable[[], str | None],
    ) -> None:
        self._plugins = plugins
        self._ownership = ownership
        self._phase = phase
        plugins.register(self, "closewait_guard_end_of_phase")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self) -> None:
        if self._phase() is None:
            self._plugins.unregister(self)
            self._ownership.turn_of(NOBODY)
