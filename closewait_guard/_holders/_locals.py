"""The local variables of frames, read so that none of them stays alive because of it."""

from __future__ import annotations

import inspect
import sys
import threading
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

__all__ = ["locals_of"]

# Until Python 3.12 a frame keeps the dict that `f_locals` made, which a program asks for by these.
_ASKS_FOR_LOCALS = frozenset({"locals", "vars", "f_locals"})
# The asserts of a test that pytest has rewritten ask for it too, and let it go at once.
_OF_PYTEST = "@py_builtins"
_KEEPS_DICT = sys.version_info < (3, 13)
# The frame's own reference to the dict, ours, and the argument's.
_NOBODY_ELSE = 3


def locals_of(frame: FrameType) -> dict[str, Any]:
    """The variables of a function's frame; none where reading them could be noticed.

    The dict that older Pythons leave behind in the frame is emptied again, because it would keep
    every value alive for as long as the function runs. That is not done behind the back of a
    debugger, which writes the same dict back into the variables, nor of a function that has asked
    for the dict itself: their frames are passed over.
    """
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return {}
    if not _KEEPS_DICT:
        return dict(frame.f_locals)
    if _is_python(frame.f_trace) or _asks_for_locals(frame.f_code) or _is_hooked():
        return {}
    kept = frame.f_locals
    found = dict(kept)
    if sys.getrefcount(kept) == _NOBODY_ELSE:
        kept.clear()
    return found


def _asks_for_locals(code: CodeType) -> bool:
    return not _ASKS_FOR_LOCALS.isdisjoint(code.co_names) and _OF_PYTEST not in code.co_names


def _is_hooked() -> bool:
    """Whether a tracer or profiler written in Python may be reading locals at this moment."""
    hooks = (sys.gettrace(), sys.getprofile(), threading.gettrace(), threading.getprofile())
    return any(_is_python(hook) and not _is_replaced_at_once(hook) for hook in hooks)


def _is_replaced_at_once(hook: object) -> bool:
    """What coverage gives to new threads sets the tracer in C at its first event."""
    return getattr(hook, "__module__", None) == "coverage.collector"


def _is_python(hook: object) -> bool:
    if isinstance(hook, FunctionType | MethodType):
        return True
    return any(isinstance(vars(cls).get("__call__"), FunctionType) for cls in type(hook).__mro__)
