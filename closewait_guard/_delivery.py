"""Tell each reporter by itself: one that fails or blocks hurts nobody else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from closewait_guard._structlog import log_error, log_warning
from closewait_guard._threads import StillBusyError, Turn
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import close_reporter, reporter_name

if TYPE_CHECKING:
    from closewait_guard.model import Report, Reporter

__all__ = [
    "Delivery",
]


class Delivery:
    """Hands reports to reporters; counts the failures, and tells of the first of each in a row.

    Args:
        reporters: Callables, or names of reporters.
        timeout: Seconds that a reporter may take before the next is told. One that takes longer
            is left alone with its report, and told the next when it is done.
        redact: What may be told of a text; raises nothing.
    """

    def __init__(
        self,
        reporters: Iterable[Reporter | str] = (),
        timeout: float = 10.0,
        redact: Callable[[str], str] = str,
    ) -> None:
        self._addressees: tuple[_Addressee, ...] = ()
        self.add(reporters)
        self._timeout = timeout
        self._redact = redact
        self.failed = 0

    @property
    def reporters(self) -> tuple[Reporter, ...]:
        """Who is told."""
        return tuple(addressee.reporter for addressee in self._addressees)

    def add(self, reporters: Iterable[Reporter | str]) -> None:
        """Tell these too."""
        self._addressees += tuple(_Addressee(each) for each in _checked(reporters))

    def deliver(self, report: Report) -> None:
        """Call every reporter with it, each in isolation."""
        passing: BaseException | None = None
        for addressee in self._addressees:
            error = addressee.told(report, self._timeout)
            if isinstance(error, StillBusyError):
                self._failed(addressee, error)
            elif error is None:
                addressee.is_failing = False
            elif isinstance(error, Exception) or not _is_main_thread():
                self._failed(addressee, error)
            else:
                passing = error
        if passing is not None:
            # The program's own wish to end; the other reporters have been told before.
            raise passing

    def close(self) -> None:
        """Let the reporters give back what they hold; one that is still busy keeps it."""
        for addressee in self._addressees:
            error = addressee.closed(self._timeout)
            if error is not None:
                self._failed(addressee, error)

    def after_fork(self) -> None:
        """In the child: the threads that told reporters are the parent's."""
        for addressee in self._addressees:
            addressee.after_fork()

    def _failed(self, addressee: _Addressee, error: BaseException) -> None:
        self.failed += 1
        if addressee.is_failing:
            return
        addressee.is_failing = True
        if isinstance(error, StillBusyError):
            log = partial(log_warning, "a reporter blocks", seconds=self._timeout)
        else:
            log = partial(log_error, "a reporter failed", error, self._redact)
        # The program's own structlog configuration may be broken, or blocked by the reporter; the
        # count still tells.
        Turn().call(partial(log, reporter=addressee.name), self._timeout)


class _Addressee:
    """One reporter, and whether it failed when it was told last."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.name = reporter_name(reporter)
        self.is_failing = False
        self._turn = Turn()

    def told(self, report: Report, timeout: float) -> BaseException | None:
        """Call the reporter; what it raised, or that it has not come back."""
        return self._turn.call(lambda: self.reporter(report), timeout)

    def closed(self, timeout: float) -> BaseException | None:
        """Let the reporter give back what it holds, unless it is in the middle of a report."""
        if not callable(getattr(self.reporter, "close", None)):
            return None
        return self._turn.call(lambda: close_reporter(self.reporter), timeout)

    def after_fork(self) -> None:
        self._turn = Turn()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _checked(reporters: Iterable[Reporter | str]) -> Iterator[Reporter]:
    if isinstance(reporters, str) or not isinstance(reporters, Iterable):
        raise ConfigurationError(f"reporters must be several callables or names, not {reporters!r}")
    for reporter in reporters:
        if isinstance(reporter, str):
            from closewait_guard.reporters import named

            yield named(reporter)
        elif callable(reporter):
            yield reporter
        else:
            raise ConfigurationError(
                f"reporters: each must be callable with a report, or a name, not {reporter!r}"
            )
