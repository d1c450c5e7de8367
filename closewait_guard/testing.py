"""Helpers for tests: a mixin for unittest, real half-closed sockets, a reporter."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from closewait_guard.exceptions import ConfigurationError, SocketLeakError
from closewait_guard.model import Report

if TYPE_CHECKING:
    from unittest import TestCase

    from closewait_guard._no_leaks import NoLeaks
else:
    TestCase = object

__all__ = [
    "CapturingReporter",
    "NoSocketLeaks",
    "connected_pair",
    "half_closed_pair",
]

# unittest, and pytest, show no calls of a module that has this in the traceback of a failure.
__unittest = True

# Sockets have no owner but the time at which they are opened.
_one_test_at_a_time = threading.RLock()


class NoSocketLeaks(TestCase):
    """Mixin for `unittest.TestCase`: a test that leaves a socket open behind it fails.

    What counts is opened from the beginning of `setUp` on, and open when `tearDown` and the
    cleanups are over. A test that has failed, or was skipped on the way, is not checked. Where
    pytest runs it with `--socket-leaks=warn` or `fail`, that is the check.

    Attributes:
        socket_leaks_grace: Seconds that sockets have to close after the test.
        socket_leaks_allow_open: Accept sockets that are open and healthy, such as those of a client
            of the class.

    Raises:
        ConfigurationError: It does not stand before `unittest.TestCase`, or tests run in several
            threads at a time.

    Example:
        >>> import unittest
        >>> class TestPrices(NoSocketLeaks, unittest.TestCase):
        ...     def test_price(self):
        ...         socket.socket().close()
        >>> unittest.TestResult() == TestPrices("test_price").run()
        False
    """

    socket_leaks_grace: float = 1.0
    socket_leaks_allow_open: bool = False

    _socket_block: NoLeaks | None = None
    _has_torn_down = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        runner = next(each for each in cls.__mro__ if "run" in vars(each))
        if runner.__module__.startswith("unittest."):
            raise ConfigurationError(
                f"{cls.__qualname__}: NoSocketLeaks must stand before {runner.__name__}, which "
                "would not call it"
            )

    def run(self, result: Any = None) -> Any:
        """Run the test, and check it."""
        if _is_checked_by_pytest(result):
            return super().run(result)
        # `setUp` comes after the event loop of an `IsolatedAsyncioTestCase`, which outlives the
        # cleanups.
        self.setUp = partial(self._begin, self.setUp)  # type: ignore[method-assign]
        # A test may call the cleanups itself, earlier.
        self.tearDown = partial(self._tear_down, self.tearDown)  # type: ignore[method-assign]
        try:
            return super().run(result)
        finally:
            del self.setUp, self.tearDown
            if (block := self._socket_block) is not None:
                # `setUp` has failed, or an interrupt has left the cleanups out.
                self._socket_block = None
                self._end(block, AssertionError(), [])
                _one_test_at_a_time.release()

    def _begin(self, set_up: Callable[[], object]) -> None:
        from closewait_guard._api import no_leaks

        self._has_torn_down = False
        if self._socket_block is not None:
            # The test begins anew by itself.
            set_up()
            return
        if not _one_test_at_a_time.acquire(blocking=False):
            raise ConfigurationError(
                "NoSocketLeaks cannot say whose socket it is while tests run in several threads"
            )
        try:
            block = no_leaks(self.socket_leaks_grace, allow_open=self.socket_leaks_allow_open)
            block.__enter__()
        except BaseException:
            _one_test_at_a_time.release()
            raise
        self._socket_block = block
        set_up()

    def _tear_down(self, tear_down: Callable[[], object]) -> None:
        try:
            tear_down()
        finally:
            self._has_torn_down = True

    def doCleanups(self) -> Any:  # noqa: N802 - as unittest has it
        """Call the cleanups, and check what they have left open."""
        result = super().doCleanups()
        if self._socket_block is None or not self._has_torn_down:
            return result
        block, self._socket_block = self._socket_block, None
        outcome = getattr(self, "_outcome", None)
        # What is expected to fail keeps its traceback, and that the variables of the test.
        is_expected = getattr(outcome, "expectedFailure", None) is not None
        has_failed = is_expected or not getattr(outcome, "success", True)
        failure = AssertionError() if has_failed else None
        found: list[SocketLeakError] = []
        # In the reverse order. What raises in an event loop has all calls of that in its traceback.
        self.addCleanup(_raise_first, found)
        if hasattr(self, "addAsyncCleanup"):
            self.addAsyncCleanup(self._end_async, block, failure, found)
        else:
            self.addCleanup(self._end, block, failure, found)
        try:
            return super().doCleanups()
        finally:
            _one_test_at_a_time.release()

    def _end(
        self, block: NoLeaks, failure: BaseException | None, found: list[SocketLeakError]
    ) -> None:
        try:
            block.__exit__(type(failure) if failure else None, failure, None)
        except SocketLeakError as error:
            found.append(error)

    async def _end_async(
        self, block: NoLeaks, failure: BaseException | None, found: list[SocketLeakError]
    ) -> None:
        import asyncio

        # As unittest does next: what they hold is closed then.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=self.socket_leaks_grace)
        try:
            await block.__aexit__(type(failure) if failure else None, failure, None)
        except SocketLeakError as error:
            found.append(error)


def _raise_first(errors: list[SocketLeakError]) -> None:
    __tracebackhide__ = True
    if errors:
        # The report says where; the calls that have found it are nothing to read.
        raise errors.pop().with_traceback(None)


def _is_checked_by_pytest(result: object) -> bool:
    """Whether the plugin checks this test: for pytest, the result is its item."""
    plugins = getattr(getattr(result, "config", None), "pluginmanager", None)
    hooks = plugins.get_plugin("closewait_guard_hooks") if plugins is not None else None
    return hooks is not None and hooks.is_checking(result)


@contextmanager
def connected_pair(host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection over loopback: our end and the peer's. Both are closed afterwards."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        ours = socket.create_connection(server.getsockname()[:2])
        theirs, _ = server.accept()
    with ours, theirs:
        yield ours, theirs


@contextmanager
def half_closed_pair(unread: bytes = b"") -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection whose peer has closed, after sending `unread`: ours is in CLOSE_WAIT.

    Example:
        >>> with half_closed_pair(b"rest") as (ours, theirs):
        ...     ours.recv(10), ours.recv(10)
        (b'rest', b'')
    """
    with connected_pair() as (ours, theirs):
        theirs.sendall(unread)
        theirs.close()
        # The FIN is under way: wait for it, so that a scan sees it for certain.
        select.select([ours], [], [], 5)
        yield ours, theirs


class CapturingReporter:
    """A reporter that keeps the reports it is given.

    Example:
        >>> reporter = CapturingReporter()
        >>> from closewait_guard import Guard
        >>> with Guard(reporters=[reporter]) as guard:
        ...     reporter.reports == [guard.report()]
        True
    """

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def __call__(self, report: Report) -> None:
        self.reports.append(report)
