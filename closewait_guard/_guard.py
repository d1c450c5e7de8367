"""`Guard` installs the recording of sockets, scans them, and delivers reports to reporters.

Also the alarm for the moment when no descriptor is left for a socket.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from closewait_guard._capture import (
    Creation,
    LockFreeCounter,
    PlainContext,
    Registry,
    capture,
    patch,
)
from closewait_guard._clock import now
from closewait_guard._delivery import Delivery
from closewait_guard._inspect import probe
from closewait_guard._no_leaks import NoLeaks
from closewait_guard._pipeline import Pipeline
from closewait_guard._redact import Redaction
from closewait_guard._threads import allows_daemons, in_child
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.settings import Settings

if TYPE_CHECKING:
    from closewait_guard._signal import SignalReport, WakeupReader
    from closewait_guard.model import Finding, Report, Reporter

__all__ = [
    "FdExhaustionAlarm",
    "Guard",
]


_SECONDS_BETWEEN = 60.0


class FdExhaustionAlarm:
    """Called in the middle of the program's own failing call: quick, and takes no descriptor.

    Args:
        report: What to do at once, in a thread of its own; once a minute at most.
        clock: Seconds that never jump.
    """

    def __init__(self, report: Callable[[], object], clock: Callable[[], float] = now) -> None:
        self._report = report
        self._clock = clock
        self._tally = LockFreeCounter()
        self._last: float | None = None

    @property
    def times(self) -> int:
        """How often there was none, so far."""
        return self._tally.total()

    def __call__(self) -> None:
        self._tally.count()
        at = self._clock()
        is_due = self._last is None or at - self._last >= _SECONDS_BETWEEN
        # A thread that is started while the interpreter ends never runs, and is waited for.
        if is_due and not sys.is_finalizing() and allows_daemons():
            self._last = at
            # Without a thread to be had, the count is in the next report.
            with suppress(RuntimeError):
                threading.Thread(
                    target=self._report, name="closewait-guard-exhausted", daemon=True
                ).start()

    def after_fork(self) -> None:
        """In the child."""
        self._tally.after_fork()


class Guard:
    """Tracks the sockets that are opened while it is installed. Several guards may be at once.

    Args:
        settings: How to look and judge; read from the environment and the nearest
            `pyproject.toml` when left out.
        reporters: Who is told by `report()`: callables, or names such as "structlog". None
            given, those of the settings are told.
        clock: Dates the reports of a series; seconds that never jump.
        registry: What has recorded births so far, and goes on to; a new one by default.

    Example:
        >>> with Guard(Settings(grace=0.1)) as guard:
        ...     guard.scan().leaks
        ()
    """

    def __init__(
        self,
        settings: Settings | None = None,
        reporters: Iterable[Reporter | str] = (),
        *,
        clock: Callable[[], float] = now,
        registry: Registry | None = None,
    ) -> None:
        self.settings = Settings.given(settings)
        _warn_of(self.settings.notes)
        self._delivery = _delivery(self.settings, reporters)
        self._registry = registry or Registry(
            self.settings.stack_depth,
            PlainContext.of(self.settings.context),
            self.settings.dropped_kept,
            capture,
        )
        self._exhaustion = self._registry.on_fd_exhausted = FdExhaustionAlarm(
            self._report_exhausted, clock
        )
        self._installed = False
        self._pipeline = Pipeline(
            self._registry,
            probe.choose_probe(self.settings.probe),
            self.settings,
            clock,
            lambda: self._installed,
        )
        self._signal: SignalReport | None = None
        self._dependants: list[Callable[[], None]] = []
        # Installed or not: a fork may find its reporters, and whoever scans, in the middle of it.
        _guards.add(self)

    @property
    def installed(self) -> bool:
        """Whether births are being recorded."""
        return self._installed

    def install(self) -> Self:
        """Begin to record births; take in the sockets that are open already. Idempotent."""
        with patch.install_lock():
            if not self._installed:
                if self.settings.signal is not None:
                    from closewait_guard._signal import SignalReport

                    self._signal = SignalReport(self.settings.signal, self._print)
                self._installed = True
                self._registry.subscribe()
                self._registry.adopt()
                self._pipeline.scanner.take_census()
        return self

    def uninstall(self) -> None:
        """Stop recording, and what depends on it. The last guard leaves the class as it was."""
        # Without the lock: their threads may be in need of it.
        while self._dependants:
            self._dependants.pop()()
        with patch.install_lock():
            was_installed, self._installed = self._installed, False
            self._registry.unsubscribe()
            signal, self._signal = self._signal, None
        self._pipeline.scanner.close()
        if signal is not None:
            signal.stop()
        if was_installed:
            self._delivery.close()

    def attribute(self, *names: str) -> None:
        """Know where native sockets are opened; see `closewait_guard.attribute`."""
        self._pipeline.scanner.attribute(*names)

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(self, *failure: object) -> None:
        self.uninstall()

    def scan(self, *, full: bool = False) -> Report:
        """Look, and tell nobody. A guard that is not installed knows no births, but looks.

        Args:
            full: Describe the healthy open sockets too, in `Report.observations`.
        """
        return self._pipeline.scan(full=full)

    def report(self) -> Report:
        """Look, and tell the reporters.

        The reports of a guard are a series: alerts tell what begins, gets worse and ends in it.
        """
        report = self._next_in_series()
        self._deliver(report)
        return report

    @property
    def failed_reports(self) -> int:
        """How many reports a reporter has failed to take."""
        return self._delivery.failed

    def mark(self) -> int:
        """A baseline for `check`: the sockets opened from now on are above it."""
        self._pipeline.scanner.take_census()
        return self._registry.mark()

    def check(self, since: int) -> Report:
        """Scan only the sockets opened after a mark: the leaks, and all that are still open.

        There is no grace time: who calls this has waited.

        Example:
            >>> with Guard() as guard:
            ...     mark = guard.mark()
            ...     sock = socket.socket()
            ...     before = [leak.verdict for leak in guard.check(mark).findings]
            ...     sock.close()
            ...     after = guard.check(mark).findings
            >>> before, after
            ([<Verdict.DEAD: 'dead'>], ())
        """
        return self._pipeline.check(since)

    def no_leaks(self, grace: float = 1.0, *, allow_open: bool = False) -> NoLeaks:
        """Prove that a block leaves no socket behind; see `closewait_guard.no_leaks`."""
        return NoLeaks(lambda: self, grace, allow_open=allow_open)

    def _next_in_series(self, notes: Iterable[str] = ()) -> Report:
        return self._pipeline.next_in_series(self._exhaustion.times, notes)

    def _open_since(self, mark: int) -> tuple[Finding, ...]:
        return self._pipeline.open_since(mark)

    def _open_creations(self, since: int) -> list[Creation]:
        """The sockets opened after a mark that are open or were dropped, without a scan."""
        from closewait_guard._capture import open_creations

        return open_creations(self._registry, since)

    def _deliver(self, report: Report) -> None:
        self._delivery.deliver(report)

    def _add_reporters(self, reporters: Iterable[Reporter | str]) -> None:
        self._delivery.add(reporters)

    def _on_uninstall(self, stop: Callable[[], None]) -> None:
        """Have something stopped that depends on this guard, once."""
        if stop not in self._dependants:
            self._dependants.append(stop)

    def _signal_reader(self) -> WakeupReader | None:
        """Have a thread read the signal of the settings at once; None where that cannot be."""
        return self._signal.start_reading() if self._signal is not None else None

    def _print(self) -> None:
        """Upon a signal. Whatever goes wrong, the program was only asked for a report."""
        with suppress(Exception):
            self._pipeline.print_report()

    def _report_exhausted(self) -> None:
        if self._installed and self._delivery.reporters:
            self.report()

    def _after_fork(self) -> None:
        self._pipeline.after_fork()
        self._exhaustion.after_fork()
        self._delivery.after_fork()
        if self._signal is not None:
            self._signal.after_fork()


def _warn_of(notes: Iterable[str]) -> None:
    """There may be no reporter whose report would say so."""
    for note in notes:
        # Where warnings are errors, the program goes on all the same.
        with suppress(Exception):
            warnings.warn(f"closewait_guard: {note}", RuntimeWarning, stacklevel=4)


def _delivery(settings: Settings, reporters: Iterable[Reporter | str]) -> Delivery:
    """To those whom the program names, else to those of the settings."""
    redact = Redaction(settings.redact).text
    if reporters:
        return Delivery(reporters, settings.reporter_timeout, redact)
    try:
        return Delivery(settings.reporters, settings.reporter_timeout, redact)
    except ConfigurationError as error:
        raise ConfigurationError(f"{settings.source_of('reporters')}: {error}") from None


_guards: weakref.WeakSet[Guard] = weakref.WeakSet()


@in_child
def _after_fork() -> None:
    for guard in list(_guards):
        guard._after_fork()
