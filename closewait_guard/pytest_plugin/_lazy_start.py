"""What records births is loaded with the first: a suite without sockets never pays for it.

Before the first socket or thread of a run there is nothing to watch.

Two descriptors put aside, for what has to be opened when a test has taken all others.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from closewait_guard._capture import SOCKET, as_function
from closewait_guard._descriptors import OwnedDescriptor, owned_pipe
from closewait_guard.pytest_plugin import _attribution

__all__ = [
    "TEARDOWN",
    "FirstSocketHook",
    "IdlePlugin",
    "SpareDescriptors",
]


class FirstSocketHook:
    """Calls `sprung` at the next birth, before it; then the socket class is as it was found.

    Whatever `sprung` raises stays here, and the wire stays up: the next birth is another try.
    """

    def __init__(self, sprung: Callable[[], object]) -> None:
        self._sprung = sprung
        self._lock = threading.RLock()
        self._is_up = False
        self._ours: Any = None
        self._found: Any = None

    def put_up(self) -> None:
        """Wait for a birth from now on."""
        self._is_up = True
        self._found = vars(SOCKET)["__init__"]
        self._ours = SOCKET.__init__ = _wire(self._found, self._spring)

    def take_down(self) -> None:
        """Wait no more. A wire that somebody has covered stays beneath, silent, until then."""
        self._is_up = False
        if self._is_on_top():
            SOCKET.__init__ = self._found

    def _is_on_top(self) -> bool:
        return vars(SOCKET)["__init__"] is self._ours

    def _spring(self) -> Any:
        """Call `sprung`, once; what is to make the socket instead of what was found, if anything.

        Whoever has covered the wire has called what he found already: it must not be called twice.
        """
        with self._lock:
            was_on_top = self._is_on_top()
            if not self._is_up:
                return None
            self.take_down()
            try:
                self._sprung()
            except BaseException as error:
                self._put_back(on_top=was_on_top)
                # Imports can fail in the middle of a test that mocks the file system. What stops
                # a test, such as its timeout, must stop it here too.
                if not isinstance(error, Exception):
                    raise
                return None
            return SOCKET.__init__ if was_on_top else None

    def _put_back(self, *, on_top: bool) -> None:
        self._is_up = True
        if on_top and vars(SOCKET)["__init__"] is self._found:
            SOCKET.__init__ = self._ours


def _wire(found: Any, spring: Callable[[], Any]) -> Any:
    original = as_function(found)

    # Its name tells the guard to look for the birth's caller further out.
    @functools.wraps(found)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        (spring() or original)(self, *args, **kwargs)

    return __init__


TEARDOWN = "pytest_runtest_teardown"
_PHASES = ("pytest_runtest_setup", "pytest_runtest_call", TEARDOWN)


class IdlePlugin:
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
        _attribution.record_thread_starts(self._before_thread)

    def end(self) -> None:
        """Leave everything as it was found."""
        _attribution.unwatch(self._before_thread)
        self._plugins.unregister(self)

    def _before_thread(self, thread: threading.Thread) -> None:  # noqa: ARG002
        self._wake()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        self.item = item

    def phase(self) -> str | None:
        """The hook of pytest that runs the test at this moment."""
        from closewait_guard._live import running_frames, variable_of

        frame = running_frames().get(self._runner)
        while frame is not None:
            name = frame.f_code.co_name
            if name in _PHASES and variable_of(frame, "item") is self.item is not None:
                return name
            frame = frame.f_back
        return None


class SpareDescriptors:
    """Both ends of a pipe. What looks and tells is loaded late, and reads lines of code."""

    def __init__(self) -> None:
        self._ends: tuple[OwnedDescriptor, ...] = ()

    def lay_up(self) -> None:
        """Put it aside, if that has not been done and there is room."""
        if not self._ends:
            with suppress(OSError):
                self._ends = owned_pipe()

    def give_up(self) -> None:
        """Let it be used."""
        ends, self._ends = self._ends, ()
        for end in ends:
            end.close()
