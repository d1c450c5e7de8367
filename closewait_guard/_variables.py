"""The local variables of frames, read so that neither the frame nor its program can notice it.

Until Python 3.12 `f_locals` writes the values into a dict that `exec`, `locals()` and debuggers
share, over whatever they have put there, and that dict keeps each value alive for as long as the
function runs. There the pointers of the frame are copied instead; from 3.13 on `f_locals` of a
function's frame is a view.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeAlias

__all__ = ["locals_of", "locals_of_other_thread", "shows_other_threads", "variable_of"]

# As in `inspect`, which is dear to import.
_CO_OPTIMIZED = 1
# Of a generator, a coroutine and an asynchronous generator.
_CO_SUSPENDABLE = 0x20 | 0x80 | 0x200
_HAS_VIEW = sys.version_info >= (3, 13)
# Before 3.13.5 the view of a call that another thread ends at that moment crashes the interpreter.
_OTHERS_CRASH = (3, 13) <= sys.version_info < (3, 13, 5)

_Pairs: TypeAlias = list[tuple[str, Any]]


def locals_of(frame: FrameType) -> dict[str, Any]:
    """The variables of a function's frame; none of a module's, which has them in its globals."""
    return dict(_read(frame)) if frame.f_code.co_flags & _CO_OPTIMIZED else {}


def locals_of_other_thread(frame: FrameType) -> dict[str, Any]:
    """The same of a call that may end at any moment; none where that could crash the interpreter.

    The view of a generator that is gone shows what has its memory now.
    """
    if _OTHERS_CRASH or (_HAS_VIEW and frame.f_code.co_flags & _CO_SUSPENDABLE):
        return {}
    return locals_of(frame)


def shows_other_threads() -> bool:
    """Whether the variables of calls in other threads can be read at all."""
    return not _OTHERS_CRASH


def variable_of(frame: FrameType, name: str) -> Any:
    """The value of one variable of a function's frame; None where it has none."""
    return locals_of(frame).get(name)


def _by_view(frame: FrameType) -> _Pairs:
    # A debugger may have added keys of any type.
    return [(name, value) for name, value in frame.f_locals.items() if type(name) is str]


def _of_nobody(_: FrameType) -> _Pairs:
    return []


_read: Callable[[FrameType], _Pairs]

if _HAS_VIEW:
    _read = _by_view
else:
    try:
        from closewait_guard._frame_copy import copied_locals as _read
    # Isolated interpreters have no ctypes, an audit hook may refuse it, and a build of Python may
    # lay frames out in another way.
    except Exception:
        _read = _of_nobody
