"""The reports of one series, and the pauses between them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from closewait_guard._clock import now
from closewait_guard._guard import Guard
from closewait_guard._pace import Pace
from closewait_guard._redact import Redaction
from closewait_guard._structlog import tell_failure
from closewait_guard.exceptions import ConfigurationError

__all__ = ["Rounds"]


class Rounds:
    """When the next report is due, and how to make it."""

    def __init__(self, guard: Guard, interval: float | None) -> None:
        wanted = guard.settings.interval if interval is None else interval
        is_number = isinstance(wanted, int | float) and not isinstance(wanted, bool)
        if not is_number or not math.isfinite(wanted) or wanted <= 0:
            raise ConfigurationError(
                f"interval must be a number of seconds above zero, not {wanted!r}"
            )
        self._guard = guard
        self._redact = Redaction(guard.settings.redact).text
        self._pace = Pace(wanted)
        self._next = now() + wanted
        self._has_failed = False

    @property
    def pause(self) -> float:
        """Seconds until the next report is due."""
        return max(0.0, self._next - now())

    def go(self) -> None:
        """Report; nothing that goes wrong ends the series. The first failure in a row is told."""
        note = self._pace.note
        try:
            with self._measured():
                report = self._guard.next_report(notes=() if note is None else (note,))
            self._guard.tell(report)
            self._has_failed = False
        except Exception as error:
            had_failed, self._has_failed = self._has_failed, True
            if not had_failed:
                with suppress(Exception):
                    tell_failure("a periodic report failed", error, self._redact)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """What the look costs this thread; what the reporters cost is their own affair."""
        begun, spent = now(), time.thread_time() - self._guard.spent_on_holders
        try:
            yield
        finally:
            # Finding out who holds the accused keeps to a share of its own.
            cost = time.thread_time() - self._guard.spent_on_holders - spent
            self._guard.charge(cost)
            self._pace = self._pace._replace(cost=max(0.0, cost))
            # Never a burst to make up for what was missed.
            self._next = max(begun + self._pace.pause, now())
