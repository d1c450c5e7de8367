"""Call each reporter by itself: one that fails neither stops the others nor reaches the program."""

from __future__ import annotations

from collections.abc import Iterable

from closewait_guard._structlog import tell_failure
from closewait_guard.model import Report, Reporter

__all__ = ["Delivery"]


class Delivery:
    """Hands reports to reporters; counts the failures, and tells of each reporter's first."""

    def __init__(self, reporters: Iterable[Reporter] = ()) -> None:
        self.reporters = tuple(reporters)
        self.failures: dict[int, int] = {}

    def __call__(self, report: Report) -> None:
        for position, reporter in enumerate(self.reporters):
            try:
                reporter(report)
            except Exception as error:
                self._failed(position, reporter, error)

    def _failed(self, position: int, reporter: Reporter, error: Exception) -> None:
        self.failures[position] = self.failures.get(position, 0) + 1
        if self.failures[position] > 1:
            return
        try:
            tell_failure("a reporter failed", error, reporter=_name_of(reporter))
        except Exception:
            # The program's own structlog configuration is broken; the count still tells.
            self.failures[position] += 0


def _name_of(reporter: Reporter) -> str:
    return getattr(reporter, "__qualname__", None) or type(reporter).__qualname__
