"""Delivers reports to reporters, each in isolation: one that fails or blocks affects no other.

Also the text of a report where no reporter is asked: on a signal, and by `render_text`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from closewait_guard._config import shown
from closewait_guard._format import WIDTH, Layout
from closewait_guard._render import render_report
from closewait_guard._stream import (
    close_reporter,
    flush_reporter,
    layout_of,
    lost_by,
    reporter_name,
    write_text,
)
from closewait_guard._structlog import log_error, log_warning
from closewait_guard._threads import CallThread, StillBusyError
from closewait_guard.exceptions import ConfigurationError

if TYPE_CHECKING:
    from closewait_guard.model import Report, Reporter

__all__ = [
    "Delivery",
    "print_text",
    "render_text",
]


class Delivery:
    """Calls reporters with reports; counts failures, and logs the first of several in a row.

    Args:
        reporters: Callables, or names of reporters.
        timeout: Seconds to wait for a reporter before the next is called. One that takes longer
            continues with its report, and gets the next one after it has returned.
        redact: Redacts a text; raises nothing.
    """

    def __init__(
        self,
        reporters: Iterable[Reporter | str] = (),
        timeout: float = 10.0,
        redact: Callable[[str], str] = str,
    ) -> None:
        self._slots: tuple[_Slot, ...] = ()
        self.add(reporters)
        self._timeout = timeout
        self._redact = redact
        self._failures = 0

    @property
    def failed(self) -> int:
        """How many reports a reporter has failed to take, or to send on."""
        return self._failures + sum(lost_by(each) for each in self.reporters)

    @property
    def reporters(self) -> tuple[Reporter, ...]:
        """The callables that get each report."""
        return tuple(slot.reporter for slot in self._slots)

    def add(self, reporters: Iterable[Reporter | str]) -> None:
        """Deliver to these too from now on."""
        self._slots += tuple(_Slot(each) for each in _resolve(reporters))

    def remove(self, reporters: Iterable[Reporter]) -> None:
        """Deliver to these no more: each once less, where it has been added more than once."""
        slots = list(self._slots)
        for reporter in reporters:
            slot = next((each for each in reversed(slots) if each.reporter is reporter), None)
            if slot is not None:
                slots.remove(slot)
        self._slots = tuple(slots)

    def deliver(
        self, report: Report, heartbeat: float | None = None, *, is_last: bool = False
    ) -> None:
        """Call every reporter with it.

        Args:
            report: The report.
            heartbeat: For one of a monitor's series, after how many seconds a reporter for people
                says that nothing has changed.
            is_last: The process ends now: have what is still being sent go out.
        """
        interrupt: BaseException | None = None
        for slot in self._slots:
            error = slot.deliver(report, self._timeout, heartbeat)
            if isinstance(error, StillBusyError):
                self._count_failure(slot, error)
            elif error is None:
                slot.is_failing = False
            elif isinstance(error, Exception) or not _is_main_thread():
                self._count_failure(slot, error)
            else:
                interrupt = error
        if is_last:
            self._flush()
        if interrupt is not None:
            # The program is to end; all other reporters have been called before.
            raise interrupt

    def _flush(self) -> None:
        # Not before all have the report: this may take a while.
        for slot in self._slots:
            error = slot.flush(self._timeout)
            if error is not None:
                self._count_failure(slot, error)

    def close(self) -> None:
        """Close the reporters that can be closed, except those that are still busy."""
        for slot in self._slots:
            error = slot.close(self._timeout)
            if error is not None:
                self._count_failure(slot, error)

    def after_fork(self) -> None:
        """In the child: the threads that call reporters are the parent's."""
        for slot in self._slots:
            slot.after_fork()

    def _count_failure(self, slot: _Slot, error: BaseException) -> None:
        self._failures += 1
        if slot.is_failing:
            return
        slot.is_failing = True
        if isinstance(error, StillBusyError):
            log = partial(log_warning, "a reporter blocks", seconds=self._timeout)
        else:
            log = partial(log_error, "a reporter failed", error, self._redact)
        # The program's structlog configuration may be broken, or blocked by the reporter; the count
        # shows the failure all the same.
        CallThread().call(partial(log, reporter=slot.name), self._timeout)


class _Slot:
    """One reporter, its thread, and whether its last call failed."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.name = reporter_name(reporter)
        self.is_failing = False
        self._thread = CallThread()

    def deliver(
        self, report: Report, timeout: float, heartbeat: float | None
    ) -> BaseException | None:
        """Call the reporter; return what it raised, or that it has not returned in time."""
        periodic = getattr(type(self.reporter), "periodic", None)
        if heartbeat is None or periodic is None:
            return self._thread.call(lambda: self.reporter(report), timeout)
        return self._thread.call(lambda: periodic(self.reporter, report, heartbeat), timeout)

    def flush(self, timeout: float) -> BaseException | None:
        """Have the reporter send what it has not sent yet."""
        if not callable(getattr(self.reporter, "flush", None)):
            return None
        return self._thread.call(lambda: flush_reporter(self.reporter), timeout)

    def close(self, timeout: float) -> BaseException | None:
        """Close the reporter, unless it is in the middle of a report."""
        if not callable(getattr(self.reporter, "close", None)):
            return None
        return self._thread.call(lambda: close_reporter(self.reporter), timeout)

    def after_fork(self) -> None:
        self._thread = CallThread()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _resolve(reporters: Iterable[Reporter | str]) -> Iterator[Reporter]:
    if isinstance(reporters, str) or not isinstance(reporters, Iterable):
        raise ConfigurationError(
            f"reporters: expected a list, as in reporters=['text'], got {shown(reporters)}"
        )
    for reporter in reporters:
        if isinstance(reporter, str):
            from closewait_guard.reporters import named

            yield named(reporter)
        elif callable(reporter):
            yield reporter
        else:
            raise ConfigurationError(
                f"reporters: expected a callable or the name of a reporter, got {shown(reporter)}"
            )


def print_text(report: Report) -> None:
    """Print a report to stderr, as wide as the terminal."""
    write_text(None, f"{render_report(report, layout_of())}\n")


def render_text(
    report: Report, *, width: int = WIDTH, everything: bool = False, verbose: bool = False
) -> str:
    """Render a report: the totals, a block for each cause, worst first, and what is not covered.

    A report without a leak is one line. Paths below the working directory are relative to it.

    Args:
        report: The report.
        width: Columns of the text. A longer identifier is not cut.
        everything: Show a block for what is not a leak, too.
        verbose: Show all calls, threads and holders.

    Example:
        >>> from closewait_guard import scan
        >>> print(render_text(scan()))  # doctest: +ELLIPSIS
        closewait-guard: no leaks (...)  pid ...
    """
    layout = Layout(width, layout_of().directory, everything, verbose)
    return render_report(report, layout)
