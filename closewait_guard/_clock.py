"""Clocks and a poll() that no test can replace, waiting, and limits on processor time."""

from __future__ import annotations

import time
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING

__all__ = [
    "SCANNING_SHARE",
    "Allowance",
    "TimeLimit",
    "nap",
    "now",
    "pause",
    "select",
    "thread_time",
    "wall",
]


if TYPE_CHECKING:
    import select

    _time = time
else:

    def _as_made(name: str) -> ModuleType:
        spec = find_spec(name)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    _time = _as_made("time")
    # gevent puts a poll there that goes through its event loop, which breaks where what it has
    # watched is closed by others; eventlet takes poll away. Green threads ask without waiting.
    select = _as_made("select")

now = _time.perf_counter
# For dates in reports. A test's mock of `time.time` would count these calls too.
wall = _time.time
# Blocks the whole thread, green threads included.
nap = _time.sleep
# The processor time of the current thread.
thread_time = _time.thread_time

_GREEN = frozenset({"gevent", "eventlet"})


def pause(seconds: float) -> None:
    """Wait that many seconds; green threads, if there are any, run meanwhile."""
    end = now() + seconds
    sleep = time.sleep
    if str(getattr(sleep, "__module__", "")).partition(".")[0] in _GREEN:
        sleep(seconds)
    left = end - now()
    if left > 0:
        nap(left)


# On a busy machine so many times the processor time may pass.
_MAX_SLOWDOWN = 10


class TimeLimit:
    """A limit on the processor time of the current thread, from now on.

    Args:
        seconds: How much processor time.

    Attributes:
        end: The latest time at which it is over, by `now()`.
    """

    def __init__(self, seconds: float) -> None:
        self._processor = thread_time() + seconds
        self.end = now() + seconds * _MAX_SLOWDOWN

    def is_over(self) -> bool:
        """Whether no time is left."""
        return thread_time() > self._processor or now() > self.end

    def part(self, share: float) -> TimeLimit:
        """A limit on a share of the time that is left."""
        return TimeLimit(max(0.0, self._processor - thread_time()) * share)


# The share of the time that passes for scanning and finding holders together: with what cannot be
# measured of both, at most 1 %.
_SHARE = 0.009
# What scanning may take of it, so that some is left for the holders.
SCANNING_SHARE = 0.006
_MAX_SAVED = 0.4


class Allowance:
    """The processor time that may be spent: a share of the time that passes, saved up to a limit.

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
        """Seconds that are left; negative if more was spent than had been saved."""
        return min(_MAX_SAVED, self._balance + max(0.0, at - self._at) * _SHARE)

    def charge(self, spent: float, at: float) -> None:
        """Record that so many seconds were spent."""
        self._balance, self._at = self.balance(at) - spent, at
