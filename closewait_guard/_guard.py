"""`Guard` installs the recording of sockets, scans them, and delivers reports to reporters.

What scans and judges takes most of the time that the package takes to load. A guard that only
records loads it late: see `loading_late`.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from closewait_guard._capture import (
    Creation,
    FdExhaustionAlarm,
    PlainContext,
    Recording,
    Registry,
    open_creations,
    open_without_socket,
    patch,
)
from closewait_guard._clock import now
from closewait_guard._config import RECORDING_DEFAULTS, is_anything_given
from closewait_guard._descriptors import NativeListing, SpareDescriptors
from closewait_guard._interruptions import loading_late, restore_late
from closewait_guard._threads import before_fork, in_child
from closewait_guard.exceptions import ConfigurationError

if TYPE_CHECKING:
    from closewait_guard._delivery import Delivery
    from closewait_guard._no_leaks import NoLeaks
    from closewait_guard._pipeline import Pipeline
    from closewait_guard._signal import SignalReport, WakeupReader
    from closewait_guard.model import Finding, Report, Reporter
    from closewait_guard.settings import Settings

__all__ = ["Guard"]


# The settings of what is recorded when a socket is opened.
_RECORDING = ("stack_depth", "context", "dropped_kept", "speedups")


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
        >>> from closewait_guard import Settings
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
        self._set_up(_resolved(settings), reporters, clock, registry)
        self._load()

    @classmethod
    def _recording(
        cls, settings: Settings | None, reporters: Iterable[Reporter | str], base: Guard | None
    ) -> Self:
        """A guard that loads what scans and judges with its first scan.

        One that has reporters, or a signal, may have to report at any moment: it loads all of it
        at once, as one does that the program makes by itself.

        Args:
            settings: As for a guard.
            reporters: As for a guard.
            base: A guard whose records it is to read, if it records the same.
        """
        guard, settings = cls.__new__(cls), _resolved(settings)
        shared = base if base is not None and base._records_for(settings) else None
        guard._set_up(settings, reporters, now, None if shared is None else shared._registry)
        guard._base = shared
        guard._is_beside_last_report = base is not None and base.settings.at_exit
        if guard._reports_by_itself():
            guard._load()
        return guard

    def _set_up(
        self,
        settings: Settings | None,
        reporters: Iterable[Reporter | str],
        clock: Callable[[], float],
        registry: Registry | None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._delivery = _make_delivery(self._settings, reporters)
        recording = self._settings or RECORDING_DEFAULTS
        self._registry = registry or Registry(
            Recording(recording.stack_depth, speedups=recording.speedups),
            PlainContext.of(recording.context),
            recording.dropped_kept,
        )
        self._fd_exhaustion = FdExhaustionAlarm(self._report_exhausted, clock)
        self._base: Guard | None = None
        # What scans and judges, as soon as it is loaded; until then, what it will need.
        self._loaded: Pipeline | None = None
        self._census: NativeListing | None = None
        self._spare_descriptors = SpareDescriptors()
        self._signal: SignalReport | None = None
        self._installed = self._is_beside_last_report = self._prints_by_default = False
        self._uninstall_callbacks: list[Callable[[], None]] = []
        self._state_recorder: Callable[[Report], None] | None = None
        # Even if it is never installed: a fork may happen in the middle of a scan or a report.
        _guards.add(self)

    def _reports_by_itself(self) -> bool:
        settings = self._settings
        return self._delivery is not None or (
            settings is not None and (settings.signal is not None or settings.probe != "auto")
        )

    def _records_for(self, settings: Settings | None) -> bool:
        wanted, own = settings or RECORDING_DEFAULTS, self._settings or RECORDING_DEFAULTS
        return all(getattr(wanted, name) == getattr(own, name) for name in _RECORDING)

    @property
    def settings(self) -> Settings:
        """How it scans and judges."""
        if self._settings is None:
            from closewait_guard.settings import Settings

            self._settings = Settings()
        return self._settings

    @property
    def _pipeline(self) -> Pipeline:
        restore_late()
        return self._loaded or self._load()

    def _load(self) -> Pipeline:
        """Load what scans, judges and renders, if that has not been done."""
        if self._loaded is not None:
            return self._loaded
        # There may be no other descriptor left, and an import needs one.
        self._spare_descriptors.release()
        try:
            pipeline = self._make_pipeline()
        except BaseException:
            if self._installed:  # It may succeed the next time.
                self._spare_descriptors.acquire()
            raise
        # Another thread may have come in, or a signal handler: the first has it.
        self._loaded = self._loaded or pipeline
        return self._loaded

    def _make_pipeline(self) -> Pipeline:
        with loading_late():
            import closewait_guard._no_leaks  # noqa: F401 - there may be no descriptor later on
            from closewait_guard._inspect import probe
            from closewait_guard._pipeline import Pipeline

            chosen = probe.choose_probe(self.settings.probe)
        pipeline = Pipeline(
            self._registry, chosen, self.settings, self._clock, lambda: self._installed
        )
        if self._base is not None:
            pipeline.scanner.share_natives(self._base._pipeline.scanner)
        if self._census is not None:
            pipeline.scanner.natives.enter(self._census, {})
        return pipeline

    @property
    def installed(self) -> bool:
        """Whether it records the sockets that are opened."""
        return self._installed

    def install(self) -> Self:
        """Begin to record sockets; adopt those that are open already. Idempotent."""
        with patch.install_lock():
            if not self._installed:
                # What scans can be loaded later only with a descriptor that is kept for that.
                is_late = self._loaded is None and self._spare_descriptors.acquire()
                if not is_late:
                    self._load()
                if self._settings is not None and self._settings.signal is not None:
                    from closewait_guard._signal import SignalReport

                    self._signal = SignalReport(self._settings.signal, self._print)
                self._installed = True
                self._registry.alarms.append(self._fd_exhaustion)
                self._registry.subscribe()
                self._registry.adopt()
                if is_late:
                    self._census = NativeListing.take(self._registry)
                else:
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
        self._spare_descriptors.release()
        if self._loaded is not None:
            self._loaded.scanner.close()
        if signal is not None:
            signal.stop()
        if was_installed and self._delivery is not None:
            self._delivery.close()

    def attribute(self, *names: str) -> None:
        """Record where native code opens sockets; see `closewait_guard.attribute`."""
        self._pipeline.scanner.attribution.wrap(*names)

    def track(self, cls: type, *, close: str | Iterable[str] = "close") -> None:
        """Record where the objects of a class are made; see `closewait_guard.track`."""
        from closewait_guard._libraries import tracked_kind

        self._registry.track(cls, tracked_kind(cls, close))

    def _attribute_on_import(self, names: Iterable[str]) -> None:
        """The same when the program imports a known library, or the module of a name."""
        from closewait_guard._inspect import attributed_libraries, attributed_module

        wrap = self._pipeline.scanner.attribution.wrap_or_note
        wanted = (*attributed_libraries(), *names)
        self._on_uninstall(patch.CallOnImport(wrap, wanted, attributed_module).install().remove)

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
        """How many reports a reporter has failed to take, or to send on."""
        return 0 if self._delivery is None else self._delivery.failed

    def mark(self) -> int:
        """A mark for `check`: the sockets that are opened from now on come after it."""
        self._pipeline.scanner.take_census()
        return self._registry.mark()

    def check(self, since: int) -> Report:
        """Scan the sockets opened after a mark without a grace time: leaks, and all still open.

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

    def no_leaks(
        self, grace: float = 1.0, *, allow_open: bool = False, descriptors: bool = False
    ) -> NoLeaks:
        """Check that a block leaves no socket behind; see `closewait_guard.no_leaks`."""
        self._load()
        from closewait_guard._no_leaks import NoLeaks

        return NoLeaks(lambda: self, grace, allow_open=allow_open, descriptors=descriptors)

    def _next_in_series(self, notes: Iterable[str] = (), *, is_last: bool = False) -> Report:
        return self._pipeline.next_in_series(self._fd_exhaustion.count, notes, is_last=is_last)

    def _reported_leaks(self) -> frozenset[int]:
        return self._pipeline.reported_leaks()

    def _open_since(self, mark: int) -> tuple[Finding, ...]:
        return self._pipeline.open_since(mark)

    def _open_creations(self, since: float) -> list[Creation]:
        """The sockets opened after a mark that are open or were dropped; with -inf, all of them."""
        return open_creations(self._registry, since)

    def _sockets_of_ended(self) -> dict[int, frozenset[int]]:
        """The serials of the sockets of each owner that has ended unclosed, by its own."""
        table = self._registry.owners
        return {} if table is None else {each.serial: each.serials for each in table.ended.copy()}

    def _owners(self, serials: Set[int]) -> dict[int, int]:
        """By `id()` of what has a descriptor that left its socket object, the socket's serial."""
        from closewait_guard._holders import owners_of_descriptors

        left = open_without_socket(self._registry, serials)
        return {id(owner): left[fd] for fd, owner in owners_of_descriptors(left.keys()).items()}

    def _deliver(self, report: Report, *, is_periodic: bool = False, is_last: bool = False) -> None:
        self._record_state(report)
        if self._delivery is not None:
            beat = self.settings.heartbeat if is_periodic else None
            self._delivery.deliver(report, beat, is_last=is_last)

    def _add_reporters(self, reporters: Iterable[Reporter | str]) -> None:
        self._load()
        if self._delivery is not None:
            self._delivery.add(reporters)
        else:
            self._delivery = _make_delivery(self._settings, reporters)

    def _require_reporter(self) -> None:
        """Print the reports if no reporter would get them: who asks for reports is to see them."""
        if self._delivery is None or not self._delivery.reporters:
            self._add_reporters(["text"])
            self._prints_by_default = True

    @property
    def _leaves_last_report(self) -> bool:
        """Whether the launcher's guard prints the last report of the program, and we would too."""
        reporters = () if self._delivery is None else self._delivery.reporters
        return self._is_beside_last_report and self._prints_by_default and len(reporters) == 1

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
            self._pipeline.print_report(self.scan(), self._record_state)

    def _record_states_by(self, record: Callable[[Report], None]) -> None:
        """Call a function with each report that is not the last: the process may be killed."""
        self._state_recorder = record

    def _record_state(self, report: Report) -> None:
        if self._state_recorder is not None:
            with suppress(Exception):
                self._state_recorder(report)

    def _report_exhausted(self) -> None:
        if self._installed and self._delivery is not None and self._delivery.reporters:
            self.report()

    def _before_fork(self) -> None:
        if self._installed:  # In the child another thread's import would never end.
            self._load()

    def _after_fork(self) -> None:
        if self._loaded is not None:
            self._loaded.after_fork()
        self._fd_exhaustion.after_fork()
        if self._delivery is not None:
            self._delivery.after_fork()
        if self._signal is not None:
            self._signal.after_fork()


def _warn_about(notes: Iterable[str]) -> None:
    """Warn at once: there may be no reporter whose report would say so."""
    for note in notes:
        # Where warnings are errors, the program continues all the same.
        with suppress(Exception):
            warnings.warn(f"closewait_guard: {note}", RuntimeWarning, stacklevel=4)


def _resolved(settings: Settings | None) -> Settings | None:
    """The settings that are given; None where none are, anywhere."""
    restore_late()
    if settings is None and not is_anything_given(os.environ):
        return None
    from closewait_guard.settings import Settings

    settings = Settings.resolve(settings)
    _warn_about(settings.notes)
    return settings


def _make_delivery(
    settings: Settings | None, reporters: Iterable[Reporter | str]
) -> Delivery | None:
    """To the reporters that the program names, else to those of the settings; None without any."""
    if not reporters and (settings is None or not settings.reporters):
        return None
    from closewait_guard._delivery import Delivery
    from closewait_guard._redact import Redaction
    from closewait_guard.settings import Settings

    settings = settings or Settings()
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


@before_fork
def _before_fork() -> None:
    for guard in list(_guards):
        guard._before_fork()
