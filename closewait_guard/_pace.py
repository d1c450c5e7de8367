"""How long to wait between two looks, so that looking costs next to nothing: pure."""

from __future__ import annotations

from typing import NamedTuple

from closewait_guard._words import seconds

__all__ = ["Pace"]

_LARGEST_SHARE = 0.01


class Pace(NamedTuple):
    """An interval that was asked for, and what the last look has cost.

    Example:
        >>> Pace(60.0, 0.01).pause, Pace(1.0, 0.02).pause
        (60.0, 2.0)
        >>> Pace(1.0, 0.02).note
        'what comes and goes within 2 s: a look takes 20 ms, too much for every 1 s'
    """

    interval: float
    cost: float = 0.0

    @property
    def pause(self) -> float:
        """Seconds from one look to the next: more than asked for if looking takes over 1 %."""
        return max(self.interval, self.cost / _LARGEST_SHARE)

    @property
    def note(self) -> str | None:
        """What cannot be seen because of the longer pause; None if it is as was asked for."""
        if self.pause <= self.interval:
            return None
        return (
            f"what comes and goes within {seconds(self.pause)}: a look takes "
            f"{self.cost * 1e3:.0f} ms, too much for every {seconds(self.interval)}"
        )
