"""Call each reporter by itself: one that fails neither stops the others nor reaches the program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from closewait_guard._structlog import tell_failure
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Report, Reporter

__all__ = ["Delivery"]


class Delivery:
    """Hands reports to reporters; counts the failures, and tells of each reporter's first."""

    def __init__(self, reporters: Iterable[Reporter] = ()) -> None:
        self.reporters = tuple(_checked(reporters))
        self.failed = 0
        self._told: set[int] = set()

    def __call__(self, report: Report) -> None:
        for position, reporter in enumerate(self.reporters):
            try:
                reporter(report)
            except Exception as error:
                self._failed(position, reporter, error)

    def _failed(self, position: int, reporter: Reporter, error: Exception) -> None:
        self.failed += 1
        if position in self._told:
            return
        self._told.add(position)
        # The program's own structlog configuration may be broken; the count still tells.
        with suppress(Exception):
            tell_failure("a reporter failed", error, reporter=_name_of(reporter))


def _checked(reporters: Iterable[Reporter]) -> Iterator[Reporter]:
    if isinstance(reporters, str) or not isinstance(reporters, Iterable):
        raise ConfigurationError(f"reporters must be several callables, not {reporters!r}")
    for reporter in reporters:
        if not callable(reporter):
            raise ConfigurationError(
                f"reporters: each must be callable with a report, not {reporter!r}"
            )
        yield reporter


def _name_of(reporter: Reporter) -> str:
    return getattr(reporter, "__qualname__", None) or type(reporter).__qualname__
