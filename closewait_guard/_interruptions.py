"""Exceptions of the program that come up in our code: those of signal handlers and audit hooks.

Python runs signal handlers between any two bytecodes of the main thread, also of ours. What they
raise must reach the program. What an audit hook raises at a question to the operating system is
counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import getattr_static
from types import CodeType, FrameType, FunctionType, MethodType, TracebackType

from closewait_guard._cpython import NSIG, current_frame, getsignal, truth_asker

__all__ = [
    "DeferredErrors",
    "Refusals",
    "interrupts",
    "refusals",
]


_call_soon = truth_asker()

# The interpreter asks up to 32 times at each occasion. A collection that finalizes many sockets in
# a row would take the longer for it: after so many questions, the exception is dropped.
_MAX_QUESTIONS = 5000


def interrupts(error: BaseException) -> bool:
    """Whether an exception that came up in our code is one of the program, and must be raised."""
    return not isinstance(error, Exception) or _from_signal_handler(error.__traceback__) is not None


def _from_signal_handler(trace: TracebackType | None) -> TracebackType | None:
    """From the signal handler on: it is called with the frame that it interrupts."""
    handlers = _codes_of_handlers()
    while trace is not None and (inner := trace.tb_next) is not None:
        # It may no longer hold that frame, or no longer be the handler.
        if id(inner.tb_frame.f_code) in handlers or _has_argument(inner.tb_frame, trace.tb_frame):
            return inner
        trace = inner
    return None


def _codes_of_handlers() -> set[int]:
    """What the program's signal handlers run, by identity; nothing of theirs is evaluated."""
    handlers = map(getsignal, range(1, NSIG))
    return {id(code) for handler in handlers if (code := _code_of(handler)) is not None}


def _code_of(handler: object) -> CodeType | None:
    function = handler
    if handler is None or type(handler) is int:
        # Not Python's, or what the system does.
        return None
    if type(handler) is MethodType:
        function = handler.__func__
    elif type(handler) is not FunctionType:
        function = getattr_static(type(handler), "__call__", None)
    return function.__code__ if type(function) is FunctionType else None


def _has_argument(frame: FrameType, interrupted: FrameType) -> bool:
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
        self._deferred: list[_Deferred] = []

    def raise_later(self, error: BaseException) -> None:
        """Raise it as soon as that is possible."""
        handler = _from_signal_handler(error.__traceback__)
        deferred = _Deferred(error.with_traceback(handler), self._is_inside, self._deferred.remove)
        self._deferred.append(deferred)
        if not _call_soon(deferred):
            self._deferred.remove(deferred)

    def _is_inside(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if id(frame.f_code) in self._codes:
                return True
            frame = frame.f_back
        return False


class _Deferred:
    """An exception that is raised as soon as its truth is asked for."""

    __slots__ = ("_error", "_is_too_early", "_on_raise", "_questions")

    def __init__(
        self,
        error: BaseException,
        is_too_early: Callable[[FrameType], bool],
        on_raise: Callable[[_Deferred], None],
    ) -> None:
        self._error = error
        self._is_too_early = is_too_early
        self._on_raise = on_raise
        self._questions = 0

    def __bool__(self) -> bool:
        self._questions += 1
        if (
            self._is_too_early(current_frame(0))
            and self._questions < _MAX_QUESTIONS
            and _call_soon(self)
        ):
            return False
        self._on_raise(self)
        if self._questions < _MAX_QUESTIONS:
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
