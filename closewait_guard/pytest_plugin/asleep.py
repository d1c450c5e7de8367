"""Before the first socket or thread of a run there is nothing to watch."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from closewait_guard.pytest_plugin import threads

__all__ = ["TEARDOWN", "Asleep"]

TEARDOWN = "pytest_runtest_teardown"
_PHASES = ("pytest_runtest_setup", "pytest_runtest_call", TEARDOWN)


class Asleep:
    """Notes which test runs, and nothing else: more hooks are dear in a suite of short tests.

    Args:
        wake: Called before the first thread is started; it must call `end`.
    """

    def __init__(self, config: pytest.Config, wake: Callable[[], None]) -> None:
        self._plugins = config.pluginmanager
        self._wake = wake
        self.item: pytest.Item | None = None
        self._runner = threading.get_ident()
        self._plugins.register(self, "closewait_guard_asleep")
        threads.watch(self._before_thread)

    def end(self) -> None:
        """Leave everything as it was found."""
        threads.unwatch(self._before_thread)
        self._plugins.unregister(self)

    def _before_thread(self, thread: threading.Thread) -> None:  # noqa: ARG002
        self._wake()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        self.item = item

    def phase(self) -> str | None:
        """The hook of pytest that runs the test at this moment."""
        from closewait_guard._running_frames import running_frames
        from closewait_guard._variables import variable_of

        frame = running_frames().get(self._runner)
        while frame is not None:
            name = frame.f_code.co_name
            if name in _PHASES and variable_of(frame, "item") is self.item is not None:
                return name
            frame = frame.f_back
        return None
