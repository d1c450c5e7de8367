"""Periodic reports of a running program, from a daemon thread or from its event loop."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, Self

from closewait_guard._clock import SCANNING_SHARE, now, thread_time
from closewait_guard._config import interval as parse_interval
from closewait_guard._config import require_number
from closewait_guard._format import format_duration
from closewait_guard._guard import Guard
from closewait_guard._redact import Redaction
from closewait_guard._structlog import log_error
from closewait_guard._threads import allows_daemons, in_child
from closewait_guard.exceptions import ConfigurationError

if TYPE_CHECKING:
    from closewait_guard._signal import EarlyLooks, SuddenEnd, WakeupReader
    from closewait_guard.model import Report

__all__ = [
    "Monitor",
    "Pace",
    "Schedule",
    "is_monitored",
    "report_forever",
]


_MAX_JOIN_SECONDS = 2.0


class Pace(NamedTuple):
    """An interval that the program wants, and the processor time of the last scan.

    Example:
        >>> Pace(60.0, 0.01).seconds, Pace(1.0, 0.012).seconds
        (60.0, 2.0)
        >>> Pace(1.0, 0.012).note
        'sockets open for less than 2 s (a scan takes 12 ms, too long for an interval of 1 s)'
    """

    interval: float
    cost: float = 0.0

    @property
    def seconds(self) -> float:
        """From one scan to the next: longer if scanning would take too much of it."""
        return max(self.interval, self.cost / SCANNING_SHARE)

    @property
    def note(self) -> str | None:
        """What is not covered because the interval is longer than wanted; None if it is not."""
        if self.seconds <= self.interval:
            return None
        return (
            f"sockets open for less than {format_duration(self.seconds)} (a scan takes "
            f"{self.cost * 1e3:.0f} ms, too long for an interval of {self.interval:g} s)"
        )


class Schedule:
    """Makes the reports of a series, and knows when the next is due.

    Args:
        guard: Whose reports.
        interval: Seconds between two; `Settings.interval` if None.
        is_wanted: Whether a report is delivered; each is if None.
    """

    def __init__(
        self,
        guard: Guard,
        interval: float | None,
        is_wanted: Callable[[Report], bool] | None = None,
    ) -> None:
        wanted = guard.settings.interval if interval is None else interval
        wanted = require_number(parse_interval, wanted, "interval")
        self._guard = guard
        self._is_wanted = is_wanted
        self._redact = Redaction(guard.settings.redact).text
        self._pace = Pace(wanted)
        self._next = now() + wanted
        self._has_failed = False

    @property
    def seconds_until_due(self) -> float:
        """How long to wait for the next report."""
        return max(0.0, self._next - now())

    def run_once(
        self, complete: Callable[[Report], Report] | None = None, *, is_last: bool = False
    ) -> None:
        """Report. No failure ends the series; the first of several in a row is logged.

        Args:
            complete: Adds to the report what the scan does not have.
            is_last: The process ends now: it has everything, not only what has changed.
        """
        note = self._pace.note
        try:
            with self._measured():
                notes = () if note is None else (note,)
                report = self._guard._next_in_series(notes, is_last=is_last)
            report = report if complete is None else complete(report)
            if self._is_wanted is None or self._is_wanted(report):
                self._guard._deliver(report, is_periodic=not is_last, is_last=is_last)
            self._has_failed = False
        except Exception as error:
            had_failed, self._has_failed = self._has_failed, True
            if not had_failed:
                with suppress(Exception):
                    log_error("a periodic report failed", error, self._redact)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Measure what a scan costs this thread; what reporters cost is not the guard's."""
        pipeline = self._guard._pipeline
        began, before = now(), thread_time() - pipeline.holders_seconds
        try:
            yield
        finally:
            # The search for holders keeps to a share of its own.
            cost = thread_time() - pipeline.holders_seconds - before
            pipeline.charge(cost)
            self._pace = self._pace._replace(cost=max(0.0, cost))
            # Never several in a row to make up for those that were missed.
            self._next = max(began + self._pace.seconds, now())


class Monitor:
    """A daemon thread that reports at every interval.

    Args:
        guard: Whose reports; it must be installed to know where sockets are opened.
        interval: Seconds between two reports; `Settings.interval` when left out. Longer if a scan
            would take more than 0.6 % of it, which the reports then say.
        at_exit: Report once more at the end of the `with` block, or of the program;
            `Settings.at_exit` when left out.
        in_children: Continue in the children that the program forks, each for itself.
        is_wanted: Whether a report is delivered; each is when left out.

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
        is_wanted: Callable[[Report], bool] | None = None,
    ) -> None:
        self.guard = guard
        self._schedule = Schedule(guard, interval, is_wanted)
        self._at_exit = guard.settings.at_exit if at_exit is None else at_exit
        self._in_children = in_children
        self._thread: threading.Thread | None = None
        self._should_end = threading.Event()
        self._is_last_wanted = self._is_end_of_block = False
        self._signal_reader: WakeupReader | None = None
        self._forget_sudden_ends: Callable[[], None] | None = None
        self._looks: EarlyLooks | None = None

    @property
    def running(self) -> bool:
        """Whether reports are to be expected."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> Self:
        """Begin; the first report comes after one interval. Idempotent."""
        if not self.running:
            self._start_or_stop()
            _monitors.add(self)
            self.guard._on_uninstall(self.stop)
            if self._at_exit and not self.guard._leaves_last_report:
                from closewait_guard._signal import EarlyLooks, before_sudden_end

                self._looks = EarlyLooks(self.guard)
                atexit.register(self._finish)
                self._forget_sudden_ends = before_sudden_end(self._on_sudden_end)
        return self

    def stop(self) -> None:
        """End, without a last report. Idempotent; does not wait for a report that blocks."""
        self._should_end.set()
        _monitors.discard(self)
        # A program may start and stop any number of them.
        with suppress(ValueError):
            self.guard._uninstall_callbacks.remove(self.stop)
        atexit.unregister(self._finish)
        self._forget_ends()
        if self._signal_reader is not None:
            self._signal_reader.stop()
        self._join(_MAX_JOIN_SECONDS)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *failure: object) -> None:
        if self._at_exit:
            # What the program closes later, that may be open yet.
            self._is_end_of_block = True
            self._finish()
        self.stop()

    def _finish(self) -> None:
        """Have the thread make one last report: at exit no new thread could be started."""
        self._is_last_wanted = True
        self._should_end.set()
        self._join(self.guard.settings.reporter_timeout)

    def _forget_ends(self) -> None:
        forget, self._forget_sudden_ends = self._forget_sudden_ends, None
        if forget is not None:
            forget()
        if self._looks is not None:
            self._looks.stop()

    def _on_sudden_end(self, _: SuddenEnd) -> None:
        """In a thread of its own; the program goes on if it is not the end after all."""
        if self.running:
            self._report_last()

    def _report_last(self) -> None:
        self._schedule.run_once(self._completed, is_last=True)

    def _completed(self, report: Report) -> Report:
        """With what the end of the program has closed, and what it will close."""
        if self._looks is not None:
            report = self._looks.add_closed_by_end(report)
        is_over = not self._is_end_of_block
        return self.guard._pipeline.with_open_at_end(report) if is_over else report

    def _join(self, timeout: float) -> None:
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        if thread.ident is not None:
            thread.join(timeout)

    def _start_or_stop(self) -> None:
        try:
            self._start_thread()
        except BaseException:
            # No thread can be started, or the program is interrupted at this moment.
            self.stop()
            raise

    def _start_thread(self) -> None:
        if not allows_daemons():
            raise ConfigurationError(
                "watch(): only the main interpreter can have a monitor, because another cannot end "
                "while its thread runs; use watch_async(), or call report() at intervals"
            )
        self._should_end = threading.Event()
        self._is_last_wanted = self._is_end_of_block = False
        self._thread = threading.Thread(
            target=self._run, args=(self._should_end,), name="closewait-guard-monitor", daemon=True
        )
        self._thread.start()
        self._signal_reader = self.guard._signal_reader()

    def _run(self, should_end: threading.Event) -> None:
        while not should_end.wait(self._schedule.seconds_until_due):
            self._schedule.run_once()
        if self._is_last_wanted:
            self._report_last()

    def _after_fork(self) -> None:
        """In the child, which has no thread but its own."""
        self._thread = self._signal_reader = None
        if self._in_children:
            # If no thread can be started, this child makes no reports.
            with suppress(RuntimeError):
                self._start_or_stop()
            return
        _monitors.discard(self)
        self._forget_ends()


_monitors: weakref.WeakSet[Monitor] = weakref.WeakSet()


def is_monitored(guard: Guard) -> bool:
    """Whether a monitor makes the reports of a guard."""
    return any(each.guard is guard and each.running for each in list(_monitors))


@in_child
def _after_fork() -> None:
    for monitor in list(_monitors):
        monitor._after_fork()


async def report_forever(guard: Guard, interval: float | None, at_exit: bool | None) -> None:
    """Report at every interval until cancelled, without ever blocking the event loop."""
    # It takes long to import, and a program without it must not pay.
    import asyncio

    schedule = Schedule(guard, interval)
    try:
        while True:
            await asyncio.sleep(schedule.seconds_until_due)
            await asyncio.to_thread(schedule.run_once)
    finally:
        if guard.settings.at_exit if at_exit is None else at_exit:
            schedule.run_once(is_last=True)
