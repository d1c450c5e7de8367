"""Threads of the guard: whether they may run, calls with a time limit; hooks of forks."""

from __future__ import annotations

import contextvars
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType

from closewait_guard._cpython import daemon_threads_allowed, interpreter_states

__all__ = [
    "CallThread",
    "StillBusyError",
    "allows_daemons",
    "in_child",
    "in_parent",
]


allows_daemons: Callable[[], bool]

_interpreters = interpreter_states("Get", "Main")
if _interpreters is None:
    allows_daemons = daemon_threads_allowed
else:
    import ctypes

    _own, _main = _interpreters

    def _is_main() -> bool:
        return bool(_own() == _main())

    allows_daemons = _is_main

    if sys.platform == "linux":
        # An interpreter that ends has daemon threads call pthread_exit(), for which glibc loads
        # this library. With no descriptor left it could not, and would abort the program.
        with suppress(OSError):
            ctypes.CDLL("libgcc_s.so.1")


class StillBusyError(Exception):
    """The function has not returned in time."""


class CallThread:
    """Calls functions in a thread, one at a time: one that blocks does not block the caller."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._has_blocked = False
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], object], timeout: float) -> BaseException | None:
        """Return what the function raised, or that it has not returned or could not start yet."""
        # Wait once for a function that blocks, and never for one that reports from within itself.
        is_hopeless = self._has_blocked or self._thread is threading.current_thread()
        if not self._lock.acquire(timeout=0 if is_hopeless else timeout):
            return StillBusyError()
        raised: list[BaseException] = []
        is_done = threading.Event()

        def call_it() -> None:
            try:
                function()
            except BaseException as error:
                raised.append(error)
            finally:
                is_done.set()
                lock.release()

        lock = self._lock
        self._run(call_it, timeout)
        self._has_blocked = not is_done.is_set()
        return StillBusyError() if self._has_blocked else next(iter(raised), None)

    def _run(self, call_it: Callable[[], None], timeout: float) -> None:
        # Values that the program has bound with structlog are bound there too.
        context = contextvars.copy_context()
        self._thread = thread = threading.Thread(
            target=context.run,
            args=(call_it,),
            name="closewait-guard-reporter",
            daemon=allows_daemons(),
        )
        if _try_start(thread):
            # From here on the next call may have begun, in another thread.
            thread.join(timeout)
        else:
            self._thread = threading.current_thread()
            call_it()


def _try_start(thread: threading.Thread) -> bool:
    """Start a thread if that is possible: there may be too many, or the interpreter ends."""
    if sys.is_finalizing() or not thread.daemon:
        # It would seem to start but never run, or keep its interpreter from ending.
        return False
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


_Functions = list[weakref.ref[Callable[[], None]]]
_in_child: _Functions = []
_in_parent: _Functions = []
# In place of this, each hook has one of those.
_functions = _in_child


def in_child(function: Callable[[], None]) -> Callable[[], None]:
    """Have a function of a module called in every forked child, in the order of registration."""
    _in_child.append(weakref.ref(function))
    return function


def in_parent(function: Callable[[], None]) -> Callable[[], None]:
    """Have a function of a module called after every fork in the process that has forked."""
    _in_parent.append(weakref.ref(function))
    return function


def _call_all() -> None:
    for reference in _functions:
        function = reference()
        if function is not None:
            function()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        after_in_child=FunctionType(_call_all.__code__, {"_functions": _in_child}),
        after_in_parent=FunctionType(_call_all.__code__, {"_functions": _in_parent}),
    )
