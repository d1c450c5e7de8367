"""What a signal handler raises while our own code runs: it is the program's, and must reach it.

Python runs the handlers between two bytecodes of the main thread, and ours are as good as any.


Questions to the operating system that an audit hook of the program does not let pass.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import sys
from collections.abc import Callable, Iterable
from inspect import getattr_static
from types import CodeType, FrameType, FunctionType, MethodType, TracebackType

__all__ = [
    "DeferredErrors",
    "Refusals",
    "interrupts",
    "refusals",
]


try:
    import ctypes

    _add_call = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.py_object)(
        ("Py_AddPendingCall", ctypes.pythonapi)
    )
    _is_true = ctypes.cast(ctypes.pythonapi.PyObject_IsTrue, ctypes.c_void_p)
# Isolated interpreters have no ctypes, and no signal handlers either.
except Exception:

    def _call_soon(asked: object) -> bool:  # noqa: ARG001
        return False
else:

    def _call_soon(asked: object) -> bool:
        """Have the interpreter ask for the truth of an object between two bytecodes to come."""
        return bool(_add_call(_is_true, asked) == 0)


# The interpreter asks up to 32 times at each occasion. A collection finalizes any number of sockets
# in a row, and would take the longer for it: what is raised in its first ones is dropped at last.
_MOST_QUESTIONS = 5000


def interrupts(error: BaseException) -> bool:
    """Whether an exception that came up in our code is none of ours, but the program's."""
    return not isinstance(error, Exception) or _beyond_signal(error.__traceback__) is not None


def _beyond_signal(trace: TracebackType | None) -> TracebackType | None:
    """From the signal handler on: it is called with the frame that it interrupts."""
    handlers = _codes_of_handlers()
    while trace is not None and (inner := trace.tb_next) is not None:
        # It may have let go of that frame, or be one no more.
        if id(inner.tb_frame.f_code) in handlers or _was_given(inner.tb_frame, trace.tb_frame):
            return inner
        trace = inner
    return None


def _codes_of_handlers() -> set[int]:
    """What the program's signal handlers run, by identity; nothing of theirs is evaluated."""
    handlers = map(_signal.getsignal, range(1, _signal.NSIG))
    return {id(code) for handler in handlers if (code := _code_of(handler)) is not None}


def _code_of(handler: object) -> CodeType | None:
    function = handler
    if type(handler) is MethodType:
        function = handler.__func__
    elif type(handler) is not FunctionType:
        function = getattr_static(type(handler), "__call__", None)
    return function.__code__ if type(function) is FunctionType else None


def _was_given(frame: FrameType, interrupted: FrameType) -> bool:
    values = tuple(frame.f_locals.values())
    rest = [value for value in values if type(value) is tuple]
    return any(value is interrupted for value in values + sum(rest, ()))


class DeferredErrors:
    """Raises an exception in the main thread as soon as no call of given code is under way.

    In a finalizer nothing that is raised reaches the program.
    """

    def __init__(self, codes: Iterable[CodeType | None]) -> None:
        # By identity, because a code object hashes its constants.
        self._codes = {id(code): code for code in codes}
        self._waiting: list[_Waiting] = []

    def raise_later(self, error: BaseException) -> None:
        """Raise it later."""
        handler = _beyond_signal(error.__traceback__)
        waiting = _Waiting(error.with_traceback(handler), self._is_inside, self._waiting.remove)
        self._waiting.append(waiting)
        if not _call_soon(waiting):
            self._waiting.remove(waiting)

    def _is_inside(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if id(frame.f_code) in self._codes:
                return True
            frame = frame.f_back
        return False


class _Waiting:
    """An exception that is raised by whoever asks for its truth."""

    __slots__ = ("_asked", "_error", "_gone", "_is_early")

    def __init__(
        self,
        error: BaseException,
        is_early: Callable[[FrameType], bool],
        gone: Callable[[_Waiting], None],
    ) -> None:
        self._error = error
        self._is_early = is_early
        self._gone = gone
        self._asked = 0

    def __bool__(self) -> bool:
        self._asked += 1
        if self._is_early(sys._getframe()) and self._asked < _MOST_QUESTIONS and _call_soon(self):
            return False
        self._gone(self)
        if self._asked < _MOST_QUESTIONS:
            raise self._error
        return False


class Refusals:
    """Counts them, each once, for the reports to say so.

    Attributes:
        total: How many there have been in this process.
    """

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0

    def note(self, error: Exception) -> None:
        """Count what a question has raised, unless the system itself has answered with it.

        Raises:
            Exception: That same one, where it is a signal handler's.
        """
        if interrupts(error):
            raise error
        if not isinstance(error, OSError):
            self.total += 1


refusals = Refusals()
