"""The reports of one series, and the pauses between them.

Reports of a running program, one in every interval, from a daemon thread.

Reports of a running program, one in every interval, from its event loop.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from closewait_guard._clock import Pace, now
from closewait_guard._guard import Guard
from closewait_guard._redact import Redaction
from closewait_guard._signal import WakeupReader
from closewait_guard._structlog import log_error
from closewait_guard._threads import allows_daemons, in_child
from closewait_guard.exceptions import ConfigurationError

__all__ = [
    "Monitor",
    "Schedule",
    "reporting",
]


class Schedule:
    """When the next report is due, and how to make it."""

    def __init__(self, guard: Guard, interval: float | None) -> None:
        wanted = guard.settings.interval if interval is None else interval
        is_number = isinstance(wanted, int | float) and not isinstance(wanted, bool)
        if not is_number or not math.isfinite(wanted) or wanted <= 0:
            raise ConfigurationError(
                f"interval must be a number of seconds above zero, not {wanted!r}"
            )
        self._guard = guard
        self._redact = Redaction(guard.settings.redact).text
        self._pace = Pace(wanted)
        self._next = now() + wanted
        self._has_failed = False

    @property
    def pause(self) -> float:
        """Seconds until the next report is due."""
        return max(0.0, self._next - now())

    def go(self) -> None:
        """Report; nothing that goes wrong ends the series. The first failure in a row is told."""
        note = self._pace.note
        try:
            with self._measured():
                report = self._guard._next_in_series(() if note is None else (note,))
            self._guard._deliver(report)
            self._has_failed = False
        except Exception as error:
            had_failed, self._has_failed = self._has_failed, True
            if not had_failed:
                with suppress(Exception):
                    log_error("a periodic report failed", error, self._redact)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """What the look costs this thread; what the reporters cost is their own affair."""
        begun, spent = now(), time.thread_time() - self._guard._pipeline.holders_seconds
        try:
            yield
        finally:
            # Finding out who holds the accused keeps to a share of its own.
            cost = time.thread_time() - self._guard._pipeline.holders_seconds - spent
            self._guard._pipeline.charge(cost)
            self._pace = self._pace._replace(cost=max(0.0, cost))
            # Never a burst to make up for what was missed.
            self._next = max(begun + self._pace.pause, now())


_LONGEST_STOP = 2.0


class Monitor:
    """A daemon thread that tells a guard's reporters at every interval.

    Args:
        guard: Whose reports; it must be installed for births to be known.
        interval: Seconds between two reports; `Settings.interval` when left out. Longer if a look
            would take more than 0.6 % of it, which the reports then say.
        at_exit: Report once more at the end of the `with` block, or of the program;
            `Settings.at_exit` when left out.
        in_children: Go on in the children that the program forks, each for itself.

    Example:
        >>> with Guard() as guard, Monitor(guard, interval=60) as monitor:
        ...     monitor.running
        True
        >>> monitor.running
        False
    """

    def __init__(
        self,
        guard: Guard,
        interval: float | None = None,
        *,
        at_exit: bool | None = None,
        in_children: bool = False,
    ) -> None:
        self.guard = guard
        self._rounds = Schedule(guard, interval)
        self._at_exit = guard.settings.at_exit if at_exit is None else at_exit
        self._in_children = in_children
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._is_last_wanted = False
        self._listening: WakeupReader | None = None

    @property
    def running(self) -> bool:
        """Whether reports are to be expected."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> Self:
        """Begin; the first report comes after one interval. Idempotent."""
        if not self.running:
            self._begin()
            _monitors.add(self)
            self.guard._on_uninstall(self.stop)
            if self._at_exit:
                atexit.register(self._finish)
        return self

    def stop(self) -> None:
        """End, without a last report. Idempotent; does not wait for a report that blocks."""
        self._ended.set()
        _monitors.discard(self)
        atexit.unregister(self._finish)
        if self._listening is not None:
            self._listening.stop()
        self._join(_LONGEST_STOP)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *failure: object) -> None:
        if self._at_exit:
            self._finish()
        self.stop()

    def _finish(self) -> None:
        """One last report, made by the thread: at exit no new one could be started."""
        self._is_last_wanted = True
        self._ended.set()
        self._join(self.guard.settings.reporter_timeout)

    def _join(self, timeout: float) -> None:
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        if thread.ident is not None:
            thread.join(timeout)

    def _begin(self) -> None:
        try:
            self._start_thread()
        except BaseException:
            # There may be no room for a thread, or the program is told to end at this moment.
            self.stop()
            raise

    def _start_thread(self) -> None:
        if not allows_daemons():
            raise ConfigurationError(
                "watch(): only the main interpreter can have a monitor, because another cannot end "
                "while its thread runs; use watch_async(), or call report() at intervals"
            )
        self._ended = threading.Event()
        self._is_last_wanted = False
        self._thread = threading.Thread(
            target=self._run, args=(self._ended,), name="closewait-guard-monitor", daemon=True
        )
        self._thread.start()
        self._listening = self.guard._signal_reader()

    def _run(self, ended: threading.Event) -> None:
        while not ended.wait(self._rounds.pause):
            self._rounds.go()
        if self._is_last_wanted:
            self._rounds.go()

    def _after_fork(self) -> None:
        """In the child, which has no thread but its own."""
        self._thread = self._listening = None
        if self._in_children:
            # Without room for a thread this child goes on without reports.
            with suppress(RuntimeError):
                self._begin()
        else:
            _monitors.discard(self)


_monitors: weakref.WeakSet[Monitor] = weakref.WeakSet()


@in_child
def _after_fork() -> None:
    for monitor in list(_monitors):
        monitor._after_fork()


async def reporting(guard: Guard, interval: float | None, at_exit: bool | None) -> None:
    """Report at every interval until cancelled, without ever blocking the event loop."""
    # It takes long to import, and a program without it must not pay.
    import asyncio

    rounds = Schedule(guard, interval)
    try:
        while True:
            await asyncio.sleep(rounds.pause)
            await asyncio.to_thread(rounds.go)
    finally:
        if guard.settings.at_exit if at_exit is None else at_exit:
            rounds.go()
