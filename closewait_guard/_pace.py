"""How long to wait between two looks, so that looking costs next to nothing: pure."""

from __future__ import annotations

from typing import NamedTuple

from closewait_guard._words import seconds

__all__ = ["Allowance", "Pace"]

# Of all time, for looking and for finding out who holds what together: with what cannot be
# measured of both, at most 1 %.
_SHARE = 0.009
# What looking may take of it, so that something is left for the holders.
_OF_LOOKING = 0.006
_MOST_SAVED = 0.4


class Pace(NamedTuple):
    """An interval that was asked for, and what the last look has cost.

    Example:
        >>> Pace(60.0, 0.01).pause, Pace(1.0, 0.012).pause
        (60.0, 2.0)
        >>> Pace(1.0, 0.012).note
        'what comes and goes within 2 s: a look takes 12 ms, too much for every 1 s'
    """

    interval: float
    cost: float = 0.0

    @property
    def pause(self) -> float:
        """Seconds from one look to the next: more if looking would take too much of it."""
        return max(self.interval, self.cost / _OF_LOOKING)

    @property
    def note(self) -> str | None:
        """What cannot be seen because of the longer pause; None if it is as was asked for."""
        if self.pause <= self.interval:
            return None
        return (
            f"what comes and goes within {seconds(self.pause)}: a look takes "
            f"{self.cost * 1e3:.0f} ms, too much for every {seconds(self.interval)}"
        )


class Allowance:
    """The processor time that may be taken: a share of the time that passes, saved up to a limit.

    Args:
        at: The time now, in seconds by any clock.

    Example:
        >>> allowance = Allowance(at=100.0)
        >>> allowance.charge(0.05, at=101.0)
        >>> round(allowance.balance(at=103.0), 3), allowance.balance(at=500.0)
        (-0.023, 0.4)
    """

    def __init__(self, at: float) -> None:
        self._balance = 0.0
        self._at = at

    def balance(self, at: float) -> float:
        """Seconds that are left; below zero what was taken ahead."""
        return min(_MOST_SAVED, self._balance + max(0.0, at - self._at) * _SHARE)

    def charge(self, spent: float, at: float) -> None:
        """Note what was taken."""
        self._balance, self._at = self.balance(at) - spent, at
