"""Tell at most once in a while."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from closewait_guard._clock import now
from closewait_guard._parse import shown
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Alert, Closed, Report, Reporter
from closewait_guard.reporters._wrapping import Wrapping

__all__ = ["every"]

_MOST_WAITING = 1000


def every(seconds: float, reporter: Reporter, *, clock: Callable[[], float] = now) -> Reporter:
    """Hand on the first report, and then one in so many seconds, whoever asks for more.

    News is not lost: alerts, and sockets that closed after all, wait for the next report that the
    reporter takes; the last thousand of each.

    Example:
        >>> from closewait_guard import reporters
        >>> every(3600, reporters.text())
        every(text.<locals>.text_reporter)
    """
    return _Every(seconds, reporter, clock)


class _Every(Wrapping):
    def __init__(self, seconds: float, reporter: Reporter, clock: Callable[[], float]) -> None:
        super().__init__("every", reporter)
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not is_number or not 0 <= seconds < math.inf:
            raise ConfigurationError(
                f"every: seconds must be a number, zero or more, not {shown(seconds)}"
            )
        self._seconds = seconds
        self._clock = clock
        self._next = -math.inf
        self._alerts: tuple[Alert, ...] = ()
        self._closed: tuple[Closed, ...] = ()

    def __call__(self, report: Report, /) -> None:
        self._alerts = (*self._alerts, *report.alerts)[-_MOST_WAITING:]
        self._closed = (*self._closed, *report.closed)[-_MOST_WAITING:]
        at = self._clock()
        if at >= self._next:
            self._next = at + self._seconds
            self._reporter(replace(report, alerts=self._alerts, closed=self._closed))
            # Only now, because it may have failed.
            self._alerts = self._closed = ()
