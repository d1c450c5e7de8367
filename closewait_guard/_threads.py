"""Threads of our own: whether they may run, calls with a time limit, what a forked child does."""

from __future__ import annotations

import _thread
import contextvars
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType

__all__ = [
    "StillBusyError",
    "Turn",
    "allows_daemons",
    "in_child",
]


allows_daemons: Callable[[], bool]

try:
    import ctypes

    _own, _main = (
        ctypes.PYFUNCTYPE(ctypes.c_void_p)((f"PyInterpreterState_{name}", ctypes.pythonapi))
        for name in ("Get", "Main")
    )
# Isolated interpreters have no ctypes, and an audit hook may refuse it.
except Exception:

    def _nothing_known() -> bool:
        return True

    # Since Python 3.12.
    allows_daemons = getattr(_thread, "daemon_threads_allowed", _nothing_known)
else:

    def _is_main() -> bool:
        return bool(_own() == _main())

    allows_daemons = _is_main

    if sys.platform == "linux":
        # An interpreter that ends has daemon threads call pthread_exit(), for which glibc loads
        # this library. With no descriptor left it could not, and would abort the program.
        with suppress(OSError):
            ctypes.CDLL("libgcc_s.so.1")


class StillBusyError(Exception):
    """The function has not come back in time."""


class Turn:
    """Calls in a thread of their own, one at a time: what blocks there blocks nobody else."""

    def __init__(self) -> None:
        self._is_taken = threading.Lock()
        self._has_blocked = False
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], object], timeout: float) -> BaseException | None:
        """What the function has raised, or that it has not come back, or could not begin yet."""
        # One that blocks is waited for once; one that is told of its own report, never.
        is_hopeless = self._has_blocked or self._thread is threading.current_thread()
        if not self._is_taken.acquire(timeout=0 if is_hopeless else timeout):
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
                is_taken.release()

        is_taken = self._is_taken
        self._run(call_it, timeout)
        self._has_blocked = not is_done.is_set()
        return StillBusyError() if self._has_blocked else next(iter(raised), None)

    def _run(self, call_it: Callable[[], None], timeout: float) -> None:
        # What the program has bound with structlog is bound there too.
        context = contextvars.copy_context()
        self._thread = thread = threading.Thread(
            target=context.run,
            args=(call_it,),
            name="closewait-guard-reporter",
            daemon=allows_daemons(),
        )
        if _is_started(thread):
            # From here on the next turn may have begun, in another thread.
            thread.join(timeout)
        else:
            self._thread = threading.current_thread()
            call_it()


def _is_started(thread: threading.Thread) -> bool:
    """Start a thread, if one is to be had: there may be too many, or the interpreter ends."""
    if sys.is_finalizing() or not thread.daemon:
        # It would seem to start, and never run; or outlast an interpreter that cannot end before.
        return False
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


_told: list[weakref.ref[Callable[[], None]]] = []


def in_child(function: Callable[[], None]) -> Callable[[], None]:
    """Have a function of a module called in every child, those that came first before it."""
    _told.append(weakref.ref(function))
    return function


def _tell() -> None:
    for told in _told:
        function = told()
        if function is not None:
            function()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FunctionType(_tell.__code__, {"_told": _told}))
