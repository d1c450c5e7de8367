"""`Guard` installs the recording of sockets, scans them, and delivers reports to reporters.

Also the alarm for the moment when no descriptor is left for a socket.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from closewait_guard._capture import (
    Creation,
    LockFreeCounter,
    PlainContext,
    Recording,
    Registry,
    patch,
)
from closewait_guard._clock import now
from closewait_guard._delivery import Delivery
from closewait_guard._holders import owners_of_descriptors
from closewait_guard._inspect import attributed_libraries, attributed_module, probe
from closewait_guard._libraries import SOCKET_CLASSES, SOCKET_CONSTRUCTORS
from closewait_guard._no_leaks import NoLeaks
from closewait_guard._pipeline import Pipeline
from closewait_guard._redact import Redaction
from closewait_guard._render import render_with_header
from closewait_guard._stream import write_text
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


_MIN_SECONDS_BETWEEN = 60.0
# The settings of what is recorded when a socket is opened.
_RECORDING = ("stack_depth", "context", "dropped_kept", "speedups")


class FdExhaustionAlarm:
    """Counts the calls that found no descriptor left, and has a report made at once.

    It runs in the middle of the program's own failing call: it is quick and takes no descriptor.

    Args:
        report: Called in a thread of its own, at most once a minute.
        clock: Seconds that never jump.
    """

    def __init__(self, report: Callable[[], object], clock: Callable[[], float] = now) -> None:
        self._report = report
        self._clock = clock
        self._counter = LockFreeCounter()
        self._last: float | None = None

    @property
    def count(self) -> int:
        """How many calls have failed so far."""
        return self._counter.total()

    def __call__(self) -> None:
        self._counter.count()
        at = self._clock()
        is_due = self._last is None or at - self._last >= _MIN_SECONDS_BETWEEN
        # A thread that is started while the interpreter ends never runs, but would be joined.
        if is_due and not sys.is_finalizing() and allows_daemons():
            self._last = at
            # If no thread can be started, the next report has the count.
            with suppress(RuntimeError):
                threading.Thread(
                    target=self._report, name="closewait-guard-exhausted", daemon=True
                ).start()

    def after_fork(self) -> None:
        """In the child."""
        self._counter.after_fork()


class Guard:
    """Tracks the sockets that are opened while it is installed. There may be several guards.

    Args:
        settings: How to scan and judge; read from the environment and the nearest
            `pyproject.toml` when left out.
        reporters: What `report()` reports to: callables, or names such as "structlog". Those of
            the settings when left out.
        clock: Dates the reports of a series; seconds that never jump.
        registry: What has recorded sockets so far, and continues to; a new one by default.

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
        self.settings = Settings.resolve(settings)
        _warn_about(self.settings.notes)
        self._delivery = _make_delivery(self.settings, reporters)
        self._registry = registry or Registry(
            Recording(self.settings.stack_depth, speedups=self.settings.speedups),
            PlainContext.of(self.settings.context),
            self.settings.dropped_kept,
        )
        self._fd_exhaustion = FdExhaustionAlarm(self._report_exhausted, clock)
        self._installed = False
        self._pipeline = Pipeline(
            self._registry,
            probe.choose_probe(self.settings.probe),
            self.settings,
            clock,
            lambda: self._installed,
        )
        self._signal: SignalReport | None = None
        self._is_beside_last_report = self._prints_by_default = False
        self._uninstall_callbacks: list[Callable[[], None]] = []
        self._state_recorder: Callable[[Report], None] | None = None
        # Even if it is never installed: a fork may happen in the middle of a scan or a report.
        _guards.add(self)

    @property
    def installed(self) -> bool:
        """Whether it records the sockets that are opened."""
        return self._installed

    def install(self) -> Self:
        """Begin to record sockets; adopt those that are open already. Idempotent."""
        with patch.install_lock():
            if not self._installed:
                if self.settings.signal is not None:
                    from closewait_guard._signal import SignalReport

                    self._signal = SignalReport(self.settings.signal, self._print)
                self._installed = True
                self._registry.alarms.append(self._fd_exhaustion)
                self._registry.subscribe()
                self._call_on_import(self._patch_class, SOCKET_CLASSES)
                self._registry.adopt()
                self._pipeline.scanner.take_census()
        return self

    def uninstall(self) -> None:
        """Stop recording, and what depends on it. The last guard restores the socket class."""
        # Without the lock, which their threads may need.
        while self._uninstall_callbacks:
            self._uninstall_callbacks.pop()()
        with patch.install_lock():
            was_installed, self._installed = self._installed, False
            if was_installed:
                self._registry.alarms.remove(self._fd_exhaustion)
            if not any(each._installed and each._registry is self._registry for each in _guards):
                self._registry.unsubscribe()
            signal, self._signal = self._signal, None
        self._pipeline.scanner.close()
        if signal is not None:
            signal.stop()
        if was_installed:
            self._delivery.close()

    def attribute(self, *names: str) -> None:
        """Record where native code opens sockets; see `closewait_guard.attribute`."""
        self._pipeline.scanner.attribute(*names)

    def _attribute_on_import(self, names: Iterable[str]) -> None:
        """The same when the program imports a known library, or the module of a name."""
        self._call_on_import(self.attribute, (*attributed_libraries(), *names))

    def _patch_class(self, name: str) -> None:
        self._registry.patch_class(name, SOCKET_CONSTRUCTORS)

    def _call_on_import(self, call: Callable[[str], object], names: Iterable[str]) -> None:
        on_import = patch.CallOnImport(call, {name: attributed_module(name) for name in names})
        self._on_uninstall(on_import.remove)
        on_import.install()

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(self, *failure: object) -> None:
        self.uninstall()

    def scan(self, *, full: bool = False) -> Report:
        """Scan, without reporting. A guard that is not installed does not know who opened what.

        Args:
            full: Describe the healthy open sockets too, in `Report.observations`.
        """
        return self._pipeline.scan(full=full)

    def report(self) -> Report:
        """Scan, and deliver the report to the reporters.

        The reports of a guard are a series: its alerts say what begins, gets worse and ends.
        """
        report = self._next_in_series()
        self._deliver(report)
        return report

    @property
    def failed_reports(self) -> int:
        """How many reports a reporter has failed to take."""
        return self._delivery.failed

    def mark(self) -> int:
        """A mark for `check`: the sockets that are opened from now on come after it."""
        self._pipeline.scanner.take_census()
        return self._registry.mark()

    def check(self, since: int) -> Report:
        """Scan only the sockets opened after a mark: the leaks, and all that are still open.

        There is no grace time: who calls this has waited.

        Example:
            >>> with Guard() as guard:
            ...     mark = guard.mark()
            ...     sock = socket.socket()
            ...     before = [finding.verdict for finding in guard.check(mark).findings]
            ...     sock.close()
            ...     after = guard.check(mark).findings
            >>> before, after
            ([<Verdict.DEAD: 'dead'>], ())
        """
        return self._pipeline.check(since)

    def no_leaks(self, grace: float = 1.0, *, allow_open: bool = False) -> NoLeaks:
        """Check that a block leaves no socket behind; see `closewait_guard.no_leaks`."""
        return NoLeaks(lambda: self, grace, allow_open=allow_open)

    def _beside(self, settings: Settings, reporters: Iterable[Reporter | str]) -> Guard:
        """A guard with settings and reporters of its own that reads the records of this one.

        One that is to record other things than this one records by itself.
        """
        is_recorded = all(
            getattr(settings, name) == getattr(self.settings, name) for name in _RECORDING
        )
        guard = Guard(settings, reporters, registry=self._registry if is_recorded else None)
        if is_recorded:
            guard._pipeline.scanner.share_natives(self._pipeline.scanner)
        guard._is_beside_last_report = self.settings.at_exit
        return guard

    def _next_in_series(self, notes: Iterable[str] = (), *, is_last: bool = False) -> Report:
        return self._pipeline.next_in_series(self._fd_exhaustion.count, notes, is_last=is_last)

    def _reported_leaks(self) -> frozenset[int]:
        """The serials of the leaks that the latest report of the series has."""
        return self._pipeline.reported_leaks()

    def _open_since(self, mark: int) -> tuple[Finding, ...]:
        return self._pipeline.open_since(mark)

    def _open_creations(self, since: int) -> list[Creation]:
        """The sockets opened after a mark that are open or were dropped, without a scan."""
        from closewait_guard._capture import open_creations

        return open_creations(self._registry, since)

    def _owners(self, serials: Set[int]) -> dict[int, int]:
        """By `id()` of what has a descriptor that left its socket object, the socket's serial."""
        from closewait_guard._capture import open_without_socket

        left = open_without_socket(self._registry, serials)
        return {id(owner): left[fd] for fd, owner in owners_of_descriptors(left.keys()).items()}

    def _deliver(self, report: Report) -> None:
        self._record_state(report)
        self._delivery.deliver(report)

    def _add_reporters(self, reporters: Iterable[Reporter | str]) -> None:
        self._delivery.add(reporters)

    def _require_reporter(self) -> None:
        """Print the reports if no reporter would get them: who asks for reports is to see them."""
        if not self._delivery.reporters:
            self._delivery.add(["text"])
            self._prints_by_default = True

    @property
    def _leaves_last_report(self) -> bool:
        """Whether the launcher's guard prints the last report of the program, and we would too."""
        is_only_printed = self._prints_by_default and len(self._delivery.reporters) == 1
        return self._is_beside_last_report and is_only_printed

    def _on_uninstall(self, stop: Callable[[], None]) -> None:
        """Call a function when this guard is uninstalled, once."""
        if stop not in self._uninstall_callbacks:
            self._uninstall_callbacks.append(stop)

    def _signal_reader(self) -> WakeupReader | None:
        """Have a thread read the signal of the settings at once; None where that cannot be."""
        return self._signal.start_reading() if self._signal is not None else None

    def _print(self) -> None:
        """Upon a signal: no failure may reach the program, which was only asked for a report."""
        with suppress(Exception):
            report = self.scan()
            self._record_state(report)
            write_text(None, render_with_header(report))

    def _record_states_by(self, record: Callable[[Report], None]) -> None:
        """Call a function with each report that is not the last: the process may be killed."""
        self._state_recorder = record

    def _record_state(self, report: Report) -> None:
        if self._state_recorder is not None:
            with suppress(Exception):
                self._state_recorder(report)

    def _report_exhausted(self) -> None:
        if self._installed and self._delivery.reporters:
            self.report()

    def _after_fork(self) -> None:
        self._pipeline.after_fork()
        self._fd_exhaustion.after_fork()
        self._delivery.after_fork()
        if self._signal is not None:
            self._signal.after_fork()


def _warn_about(notes: Iterable[str]) -> None:
    """Warn at once: there may be no reporter whose report would say so."""
    for note in notes:
        # Where warnings are errors, the program continues all the same.
        with suppress(Exception):
            warnings.warn(f"closewait_guard: {note}", RuntimeWarning, stacklevel=4)


def _make_delivery(settings: Settings, reporters: Iterable[Reporter | str]) -> Delivery:
    """To the reporters that the program names, else to those of the settings."""
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
