"""`no_leaks`: a block, or a function, must leave no socket behind.

Before anything counts as a leak, sockets that are about to close get the time to do so.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Protocol, TypeVar

from closewait_guard._clock import nap, now, pause
from closewait_guard._config import shown
from closewait_guard._decorators import around
from closewait_guard._enums import Verdict
from closewait_guard._render import render_text
from closewait_guard.exceptions import ConfigurationError, SocketLeakError
from closewait_guard.model import Finding, Report

__all__ = [
    "NoLeaks",
    "Settling",
]


_FIRST_WAIT = 0.001


class Settling:
    """Yields how long to wait before each further look; `findings` are those of the last look.

    The waits double, and end with the grace time, as the clock and as their sum has it. Garbage is
    collected once, and neither happens when nothing is suspect.

    Args:
        find_open: The sockets that are still open, or were dropped.
        grace: Seconds that the waits may take together.
    """

    def __init__(self, find_open: Callable[[], Sequence[Finding]], grace: float) -> None:
        self._find_open = find_open
        self._left = grace
        self._deadline = now() + grace
        self.findings: Sequence[Finding] = ()

    def __iter__(self) -> Generator[float, None, None]:
        wait, collected = _FIRST_WAIT, False
        while not self._has_settled():
            left = min(self._left, self._deadline - now())
            if left <= 0 and collected:
                return
            if left > 0:
                yield min(wait, left)
                self._left -= wait
            if not collected:
                # After one short wait: what closes by itself never costs a collection.
                gc.collect()
                collected = True
            wait *= 2

    def _has_settled(self) -> bool:
        """Whether waiting can change nothing: all is closed, except what was dropped."""
        self.findings = self._find_open()
        return all(each.verdict is Verdict.DROPPED for each in self.findings)


_F = TypeVar("_F", bound=Callable[..., object])

# The coarsest clock of an event loop, that of uvloop, counts milliseconds.
_TICK = 0.001


class _Guard(Protocol):
    """What is asked of a guard."""

    @property
    def installed(self) -> bool: ...
    def install(self) -> object: ...
    def uninstall(self) -> None: ...
    def mark(self) -> int: ...
    def check(self, since: int) -> Report: ...
    def _open_since(self, mark: int) -> Sequence[Finding]: ...


class NoLeaks(AbstractContextManager[None], AbstractAsyncContextManager[None]):
    """Fails if a socket opened inside is still open at the end, or was dropped while open.

    Works with `with`, with `async with`, and as a decorator of functions and coroutine functions.
    Waits for sockets that are about to close, at most `grace` seconds, and collects garbage once;
    neither happens when nothing is suspect. An exception from the body passes as it is.

    Args:
        guard: Makes, or names, the guard to use; one that is not installed is, for the block.
        grace: Seconds that sockets have to close after the block.
        allow_open: Accept sockets that are open and well, such as those of a pool that stays; not
            those that could not be looked at.

    Raises:
        SocketLeakError: Sockets were leaked; the text is the report.
    """

    def __init__(self, guard: Callable[[], _Guard], grace: float, *, allow_open: bool) -> None:
        if isinstance(grace, bool) or not isinstance(grace, int | float) or not grace >= 0:
            raise ConfigurationError(
                f"no_leaks(grace=...): grace must be a number of seconds, zero or more, "
                f"not {shown(grace)}"
            )
        self._make = guard
        self._grace = grace
        self._allow_open = allow_open
        self._open: list[tuple[_Guard, bool, int]] = []

    def __call__(self, function: _F) -> _F:
        return around(
            function, lambda: NoLeaks(self._make, self._grace, allow_open=self._allow_open)
        )

    def __enter__(self) -> None:
        guard = self._make()
        is_ours = not guard.installed
        if is_ours:
            guard.install()
        self._open.append((guard, is_ours, guard.mark()))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._ending(error) as waits:
            for wait in waits:
                pause(wait)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._ending(error) as waits:
            for wait in waits:
                await _sleep(wait)

    @contextmanager
    def _ending(self, error: BaseException | None) -> Iterator[Iterable[float]]:
        """Hand out the waits of the end of the block, and judge after the last of them."""
        guard, is_ours, mark = self._open.pop()
        try:
            if error is not None:
                yield ()
                return
            settling = Settling(lambda: guard._open_since(mark), self._grace)
            yield settling
            if self._refused(settling.findings):
                # Once more, to say also who holds what is still open.
                self._raise_if_leaky(guard.check(mark))
        finally:
            if is_ours:
                guard.uninstall()

    def _raise_if_leaky(self, report: Report) -> None:
        if refused := self._refused(report.findings):
            report = replace(report, findings=refused)
            raise SocketLeakError(render_text(report), report)

    def _refused(self, findings: Iterable[Finding]) -> tuple[Finding, ...]:
        return tuple(
            each
            for each in findings
            # What could not be described is not known to be healthy.
            if each.is_leak or not self._allow_open or not each.observation.is_described
        )


async def _sleep(seconds: float) -> None:
    """Wait in whichever event loop is running, so that it can close what it is closing."""
    asyncio, trio = sys.modules.get("asyncio"), sys.modules.get("trio")
    if asyncio is not None and (loop := asyncio._get_running_loop()) is not None:
        await _wait(seconds, loop.time, asyncio.sleep)
    elif trio is not None:
        await _wait(seconds, trio.current_time, trio.sleep)
    else:
        # Neither loop is running, so that there is none to hold up.
        pause(seconds)


async def _wait(
    seconds: float, time: Callable[[], float], sleep: Callable[[float], Awaitable[object]]
) -> None:
    """Sleep in an event loop, though a test may have stopped its clock, or made it run ahead."""
    end, before = now() + seconds, time()
    nap(_TICK)
    await sleep(0)
    if time() > before:
        await sleep(max(0.0, end - now()))
    while now() < end:
        nap(_TICK)
        await sleep(0)
