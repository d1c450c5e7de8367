"""Time as it really passes, for ages and deadlines, whatever a test has made of its own clock.

freezegun replaces `time.monotonic` and the like in every module that has them by name, time-machine
changes them in the interpreter, and others put a mock there. None of that reaches `perf_counter` of
a copy of the time module that is in no list of modules; it counts as `monotonic` does.
"""

from __future__ import annotations

import time
from importlib.util import find_spec, module_from_spec
from typing import TYPE_CHECKING

__all__ = ["nap", "now", "pause", "wall"]

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
