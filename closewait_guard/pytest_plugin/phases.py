"""The turn of a test lasts from its set-up to the end of its teardown, which the watch looks at.

What other plugins do between its phases, such as to pass on a report, is no part of the test.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

from closewait_guard.pytest_plugin.ownership import NOBODY, Ownership

if TYPE_CHECKING:
    from closewait_guard.pytest_plugin.watch import Watch

__all__ = ["Bodies", "Phases"]

_WITHOUT_SOCKETS = ("_pytest", "closewait_guard")


class Pauses:
    """It is nobody's turn meanwhile. Apart, because hooks are dear in a suite of short tests."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, object, object]:
        with self._ownership.turn(NOBODY):
            return (yield)

    pytest_runtest_logreport = pytest_exception_interact = pytest_runtest_makereport


_BETWEEN = frozenset(name for name in vars(Pauses) if name.startswith("pytest_"))


class Phases:
    """Begins the turn of each test; has it paused where other plugins act between the phases."""

    def __init__(self, watch: Watch, plugins: pytest.PytestPluginManager) -> None:
        self._watch = watch
        self._plugins = plugins

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._watch.start(item)

    def pytest_plugin_registered(self, plugin: object) -> None:
        """Called for those too that have been registered before."""
        name = "closewait_guard_pauses"
        if not self._plugins.has_plugin(name) and self._acts_between(plugin):
            self._plugins.register(Pauses(self._watch.ownership), name)

    def _acts_between(self, plugin: object) -> bool:
        home = getattr(plugin, "__name__", None) or type(plugin).__module__
        if str(home).partition(".")[0] in _WITHOUT_SOCKETS:
            return False
        callers = self._plugins.get_hookcallers(plugin) or ()
        return any(caller.name in _BETWEEN for caller in callers)


class Bodies:
    """Notes of a test whether its body came to its end: asked where a marker allows leaks."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        result = yield
        if self._watch.running is not None:
            self._watch.running.called = True
        return result
