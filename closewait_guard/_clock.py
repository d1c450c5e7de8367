"""Time as it really passes, limits of time, and how often a repeated search may run."""

from __future__ import annotations

import time
from importlib.util import find_spec, module_from_spec
from typing import TYPE_CHECKING, NamedTuple

from closewait_guard._format import format_duration

__all__ = [
    "Allowance",
    "Pace",
    "TimeLimit",
    "nap",
    "now",
    "pause",
    "wall",
]


if TYPE_CHECKING:
    _time = time
else:
    _spec = find_spec("time")
    _time = module_from_spec(_spec)
    _spec.loader.exec_module(_time)

now = _time.perf_counter
# Dates what is reported, and is no mock that a test counts the calls of.
wall = _time.time
# Holds up the whole thread, green threads included.
nap = _time.sleep

_GREEN = frozenset({"gevent", "eventlet"})


def pause(seconds: float) -> None:
    """Wait for so long, and let green threads run meanwhile, if there are any."""
    end = now() + seconds
    sleep = time.sleep
    if str(getattr(sleep, "__module__", "")).partition(".")[0] in _GREEN:
        sleep(seconds)
    left = end - now()
    if left > 0:
        nap(left)


# Where others use the processor too, so many times as long may pass.
_WAITING = 10


class TimeLimit:
    """Begins at once, for the thread that makes it.

    Args:
        seconds: Of processor time.

    Attributes:
        end: When it is over for certain, by `now()`.
    """

    def __init__(self, seconds: float) -> None:
        self._processor = time.thread_time() + seconds
        self.end = now() + seconds * _WAITING

    def is_over(self) -> bool:
        """Whether no time is left."""
        return time.thread_time() > self._processor or now() > self.end

    def part(self, share: float) -> TimeLimit:
        """A limit of a share of what is left."""
        return TimeLimit(max(0.0, self._processor - time.thread_time()) * share)


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
            f"what comes and goes within {format_duration(self.pause)}: a look takes "
            f"{self.cost * 1e3:.0f} ms, too much for every {format_duration(self.interval)}"
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
