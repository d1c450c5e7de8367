"""The frames that the threads are in, asked for only where that is safe.

`sys._current_frames()` goes through all interpreters of the process. From Python 3.12 on another
may run at that moment, and the process aborts; before, its frames are none of our business.
"""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable
from itertools import compress
from types import FrameType

from closewait_guard._refusals import refusals

__all__ = ["running_frames", "sees_all_threads"]


def running_frames() -> dict[int, FrameType]:
    """By thread: where it is. Only this thread where the process has several interpreters."""
    # A variable that holds the frame it is in would keep all that the callers have: none here holds
    # them, and the caller is not given its own.
    return _frames_if_alone() or {threading.get_ident(): sys._getframe(2)}


def sees_all_threads() -> bool:
    """Whether `running_frames` tells of other threads than this one."""
    return bool(_frames_if_alone())


def _nothing() -> dict[int, FrameType]:
    return {}


_frames_if_alone: Callable[[], dict[int, FrameType]]

try:
    import ctypes

    # Not `_interpreters.list_all()`: it reads what another thread may be about to free.
    _newest, _main = (
        ctypes.PYFUNCTYPE(ctypes.c_void_p)((f"PyInterpreterState_{name}", ctypes.pythonapi))
        for name in ("Head", "Main")
    )
# Isolated interpreters have no ctypes, and an audit hook may refuse it.
except Exception:
    _frames_if_alone = _nothing
else:

    def _if_alone() -> dict[int, FrameType]:
        """All frames, if the newest interpreter is the main one.

        Question and answer are one call into C: no thread can make an interpreter in between.
        """
        is_alone = map(operator.eq, map(operator.call, (_newest,)), map(operator.call, (_main,)))
        try:
            return next(map(operator.call, compress((sys._current_frames,), is_alone)), {})
        except Exception as error:
            refusals.note(error)
            return {}

    _frames_if_alone = _if_alone
