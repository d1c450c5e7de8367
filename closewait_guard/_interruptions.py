"""Exceptions of the program that come up in our code: those of signal handlers and audit hooks.

Python runs signal handlers between any two bytecodes of the main thread, also of ours. What they
raise must reach the program. What an audit hook raises at a question to the operating system is
counted. What it does to an import is said in one sentence, as are all other reasons why what is
loaded late cannot be loaded any more.
"""

from __future__ import annotations

import gc
import io
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType, TracebackType

from closewait_guard._cpython import (
    NSIG,
    current_frame,
    getsignal,
    keep_open_in_tokenize,
    truth_asker,
)
from closewait_guard.exceptions import CloseWaitGuardError, NotLoadedError

__all__ = [
    "DeferredErrors",
    "Refusals",
    "interrupts",
    "loading_late",
    "refusals",
    "restore_late",
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
        function = _call_of(type(handler))
    return function.__code__ if type(function) is FunctionType else None


def _call_of(cls: type) -> object:
    """What calls the objects of a class, as `inspect` finds it, which takes long to import."""
    for each in _mro(cls):
        if "__call__" in (names := _vars(each)):
            return names["__call__"]
    return None


_mro = type.__dict__["__mro__"].__get__
_vars = type.__dict__["__dict__"].__get__


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


def _state_on_disk() -> tuple[int, int] | None:
    """Of this file, or of the archive that it is in: what is another once it is replaced."""
    path = _FILE
    while not (status := _stat(path)):
        path, last = os.path.dirname(path), path  # noqa: PTH120 - pathlib is slow to load
        if path == last:
            return None
    return (status.st_mtime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else None


def _stat(path: str, ask: Callable[[str], os.stat_result] = os.stat) -> os.stat_result | None:
    # Not by a mock that a test has in place.
    try:
        return ask(path)
    except OSError:
        return None


# The program may change its directory.
_FILE = os.path.abspath(__file__)  # noqa: PTH100
_on_disk = _state_on_disk()
_PACKAGE = __name__.rpartition(".")[0] + "."
# By name, all modules of the package after something was loaded late.
_late: dict[str, ModuleType] = {}


def _is_current() -> bool:
    """Whether imports find this copy of the package."""
    own = sys.modules.get(__name__)
    return type(own) is ModuleType and vars(own) is globals()


def restore_late() -> None:
    """Put back what a test has removed from `sys.modules`, with all that was loaded meanwhile.

    Loaded again, each class would be there twice, and neither would know the other's objects.
    """
    if _is_current():
        for name, module in list(_late.items()):
            sys.modules.setdefault(name, module)


@contextmanager
def loading_late() -> Iterator[None]:
    """Import late, in whatever state the program is by now; what fails is said in one sentence.

    Raises:
        NotLoadedError: It cannot be loaded, or would not be of this version.
    """
    if not _is_current():
        raise _not_loaded("the package was removed from sys.modules")
    if _state_on_disk() != _on_disk:
        raise _not_loaded("its files have been replaced; restart the program")
    try:
        with keep_open_in_tokenize():
            yield
    except CloseWaitGuardError:
        raise
    except Exception as error:
        if interrupts(error):
            raise
        raise _not_loaded(f"{type(error).__name__}: {error}") from error
    # The program may put anything there, under any name.
    for name, module in list(sys.modules.items()):
        is_ours = type(name) is str and name.startswith(_PACKAGE) and type(module) is ModuleType
        if is_ours and name not in _late:
            _late[name] = module
            _use_originals(vars(module))


def _not_loaded(why: str) -> NotLoadedError:
    return NotLoadedError(
        f"what scans cannot be loaded: {why} (a scan() right after install() loads it early)"
    )


def _use_originals(names: dict[str, object]) -> None:
    for original in _ORIGINALS:
        if names.get(original.__name__, original) is not original:
            names[original.__name__] = original


# A test that replaces whole modules would have what is loaded meanwhile use its own forever.
_ORIGINALS = (gc, io, os, socket, sys, threading, time)
