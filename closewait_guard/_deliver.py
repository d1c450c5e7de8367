"""Tell each reporter by itself: one that fails or blocks hurts nobody else."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress

from closewait_guard._reporting import closed, described
from closewait_guard._structlog import tell, tell_failure
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Report, Reporter

__all__ = ["Delivery"]


class Delivery:
    """Hands reports to reporters; counts the failures, and tells of the first of each in a row.

    Args:
        reporters: Callables, or names of reporters.
        timeout: Seconds that a reporter may take before the next is told. One that takes longer
            is left alone with its report, and told the next when it is done.
    """

    def __init__(self, reporters: Iterable[Reporter | str] = (), timeout: float = 10.0) -> None:
        self._addressees: tuple[_Addressee, ...] = ()
        self.add(reporters)
        self._timeout = timeout
        self.failed = 0

    @property
    def reporters(self) -> tuple[Reporter, ...]:
        """Who is told."""
        return tuple(addressee.reporter for addressee in self._addressees)

    def add(self, reporters: Iterable[Reporter | str]) -> None:
        """Tell these too."""
        self._addressees += tuple(_Addressee(each) for each in _checked(reporters))

    def __call__(self, report: Report) -> None:
        for addressee in self._addressees:
            if addressee.is_busy():
                self.failed += 1
                continue
            error = addressee.told(report, self._timeout)
            if error is not None:
                self._failed(addressee, error)
            elif not addressee.is_busy():
                addressee.is_failing = False

    def close(self) -> None:
        """Let the reporters give back what they hold."""
        for addressee in self._addressees:
            try:
                closed(addressee.reporter)
            except Exception as error:
                self._failed(addressee, error)

    def _failed(self, addressee: _Addressee, error: BaseException) -> None:
        if not isinstance(error, Exception) and _is_main_thread():
            raise error
        self.failed += 1
        if addressee.is_failing:
            return
        addressee.is_failing = True
        # The program's own structlog configuration may be broken; the count still tells.
        with suppress(Exception):
            if isinstance(error, _StillBusyError):
                tell("a reporter blocks", reporter=addressee.name, seconds=self._timeout)
            else:
                tell_failure("a reporter failed", error, reporter=addressee.name)


class _StillBusyError(Exception):
    """A reporter has not come back in time."""


class _Addressee:
    """One reporter, and the thread in which it is told: what blocks there blocks nobody else."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.name = described(reporter)
        self.is_failing = False
        self._thread: threading.Thread | None = None

    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def told(self, report: Report, timeout: float) -> BaseException | None:
        """Call the reporter; what it raised, or that it has not come back."""
        raised: list[BaseException] = []

        def tell_it() -> None:
            try:
                self.reporter(report)
            except BaseException as error:
                raised.append(error)

        # What the program has bound with structlog is bound there too.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(tell_it,), name="closewait-guard-reporter", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError:
            # No thread is to be had: too many, or the interpreter shuts down.
            self._thread = None
            tell_it()
        else:
            self._thread.join(timeout)
        return raised[0] if raised else _StillBusyError() if self.is_busy() else None


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
