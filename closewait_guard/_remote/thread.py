"""Threads that the program does not see among its own, and that make way for each fork.

From Python 3.12 on a fork beside another thread is warned of, which can be an error. So each of
these threads is ended before a fork, and another goes on in its place afterwards: in some versions
once `fork()` has returned, because they count the threads when all hooks have been called.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import BuiltinFunctionType, FrameType
from typing import Any, NamedTuple

from closewait_guard._clock import nap, now, pause
from closewait_guard._cpython import current_frame, threads, truth_asker
from closewait_guard._threads import before_fork, get_ident, in_child, in_parent

__all__ = [
    "IS_GREEN",
    "RepeatingThread",
]


# Of a step that takes longer, a fork is not kept waiting for the end.
_MAX_SECONDS_BEFORE_FORK = 0.2
# While the step that a fork has not waited for goes on.
_SECONDS_BETWEEN_ATTEMPTS = 0.05
# These versions count the threads when the hooks of a fork have been called, others before that.
_COUNTS_LATE = sys.version_info[:2] in {(3, 13), (3, 14)}
# Hooks of the program may go on for long.
_MAX_QUESTIONS = 5000
_main_thread = threading.main_thread
_call_soon = truth_asker()


class _Makers(NamedTuple):
    """What a thread is started with, and what makes its locks: they must fit together."""

    start: Callable[..., object]
    lock: Callable[[], Any]

    @property
    def are_green(self) -> bool:
        return not isinstance(self.start, BuiltinFunctionType)

    @classmethod
    def native(cls) -> _Makers:
        """Those of Python itself, also where gevent has replaced them."""
        gevent = sys.modules.get("gevent.monkey")
        names = "start_new_thread", "allocate_lock"
        return cls(*(gevent.get_original("_thread", names) if gevent else _AS_LOADED))


# Before or after gevent.
_AS_LOADED = _Makers(_thread.start_new_thread, _thread.allocate_lock)
IS_GREEN = _AS_LOADED.are_green


class RepeatingThread:
    """Calls a function again and again, in one thread or, after a fork, another; never in two.

    A forked child has none: it begins one of its own, if it wants to.

    Args:
        step: The function. It returns after how many seconds it is to be called again, or None
            when nothing is left to do.
        delay: Seconds until it is called first.
        is_native: Whether it is to run beside green threads, where the program has those, and not
            as one of them.
        on_loss: Called where no thread can be started after a fork.

    Raises:
        RuntimeError: No thread can be started.
    """

    def __init__(
        self,
        step: Callable[[], float | None],
        delay: float = 0.0,
        *,
        is_native: bool = False,
        on_loss: Callable[[], object] = lambda: None,
    ) -> None:
        self._step, self._on_loss = step, on_loss
        self._makers = _Makers.native() if is_native else _AS_LOADED
        self._is_over = self._is_paused = False
        self._in_step = self._makers.lock()
        self._thread = _Thread(self._repeat, delay, self._makers)
        _unfinished.add(self)

    def stop(self, timeout: float) -> None:
        """End it, and wait for that, unless it is the one that asks for it. Idempotent."""
        self._is_over = True
        _unfinished.discard(self)
        self._thread.end(timeout)

    def _pause(self) -> None:
        """Before a fork. Green threads are none to the system, and need not make way."""
        if not self._makers.are_green:
            # Also if a signal handler raises in the middle of it.
            self._is_paused = True
            self._thread.end(_MAX_SECONDS_BEFORE_FORK)

    def _resume(self) -> None:
        """After it, in the process that has forked."""
        was_paused, self._is_paused = self._is_paused, False
        if not was_paused or self._is_over:
            return
        try:
            self._thread = _Thread(self._repeat, 0.0, self._makers)
        except RuntimeError:
            self._is_over = True
            _unfinished.discard(self)
            self._on_loss()

    def _forget(self) -> None:
        """In the child, in which green threads go on."""
        self._is_over = self._thread.is_ending = True

    # In the thread.

    def _repeat(self, thread: _Thread) -> None:
        while not (thread.is_ending or self._is_over):
            thread.wait(self._go_on())

    def _go_on(self) -> float:
        if not self._in_step.acquire(blocking=False):
            return _SECONDS_BETWEEN_ATTEMPTS
        try:
            seconds = None if self._is_over else self._step()
            if seconds is None:
                self._is_over = True
                _unfinished.discard(self)
            return seconds or 0.0
        finally:
            if not self._makers.are_green:
                _forget_dummy()
            self._in_step.release()


def _forget_dummy() -> None:
    """Remove this thread from the program's own: starting or joining another has added it."""
    ident = _thread.get_ident()
    # Python forgets it with the thread from 3.13 on only.
    if type(threads.get(ident)).__name__ == "_DummyThread":
        threads.pop(ident, None)


class _Thread:
    """One thread, which does not keep the program from ending.

    Attributes:
        is_ending: Whether it is to return.
    """

    def __init__(self, function: Callable[[_Thread], None], delay: float, makers: _Makers) -> None:
        self.is_ending = False
        self._is_green = makers.are_green
        self._function, self._delay = function, delay
        self._number = 0
        self._runs, self._waits = makers.lock(), makers.lock()
        self._runs.acquire()
        self._waits.acquire()
        makers.start(self._run, ())

    def _run(self) -> None:
        try:
            self._number = _thread.get_native_id()
            if not self._is_green:
                # They are the program's, and would interrupt what waits here. A green thread has
                # none of its own to block them in: the main thread would get none any more.
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            self.wait(self._delay)
            if not self.is_ending:
                self._function(self)
        finally:
            self._runs.release()

    def wait(self, seconds: float) -> None:
        """In it: wait, unless it is to return."""
        if self._is_green:
            pause(seconds)
        else:
            self._waits.acquire(timeout=seconds)

    def end(self, timeout: float) -> None:
        """Wait until it is gone, also for the system, which is a moment later."""
        self.is_ending = True
        end = now() + timeout
        with suppress(RuntimeError):
            self._waits.release()
        if self._number == _thread.get_native_id() or not self._runs.acquire(timeout=timeout):
            return
        task = f"/proc/self/task/{self._number}"
        while not self._is_green and os.path.exists(task) and now() < end:  # noqa: PTH110
            nap(0.0001)


_unfinished: set[RepeatingThread] = set()


@before_fork
def _before_fork() -> None:
    for thread in list(_unfinished):
        thread._pause()


@in_parent
def _in_parent() -> None:
    if _COUNTS_LATE and _unfinished and get_ident() == _main_thread().ident:
        hooks = current_frame(0).f_back
        fork = None if hooks is None else hooks.f_back
        # A server in C that forks, such as uWSGI, has no frame, and runs no Python code afterwards.
        if fork is not None and _Resumption(fork, fork.f_lasti).ask_soon():
            return
    _resume_all()


def _resume_all() -> None:
    for thread in list(_unfinished):
        thread._resume()


class _Resumption:
    """Has all go on as soon as its truth is asked for after `fork()` has returned.

    Args:
        frame: What has called that.
        offset: Where it stood then.
    """

    __slots__ = ("_frame", "_offset", "_questions")

    def __init__(self, frame: FrameType, offset: int) -> None:
        self._frame, self._offset = frame, offset
        self._questions = 0

    def ask_soon(self) -> bool:
        """Return whether it will be asked."""
        # The interpreter does not keep what it is to ask, and this module may be gone by then.
        atexit.register(self._keep)
        if _call_soon(self):
            return True
        atexit.unregister(self._keep)
        return False

    def _keep(self) -> None:
        """At the end of the program there is nothing to be done."""

    def __bool__(self) -> bool:
        self._questions += 1
        if self._is_in_fork() and self._questions < _MAX_QUESTIONS and _call_soon(self):
            return False
        _resume_all()
        atexit.unregister(self._keep)
        return False

    def _is_in_fork(self) -> bool:
        """Whether other hooks of the fork are under way."""
        asked = current_frame(0).f_back
        frame = None if asked is None else asked.f_back
        if frame is self._frame:
            return False
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None and frame.f_lasti == self._offset


@in_child
def _in_child() -> None:
    for thread in list(_unfinished):
        thread._forget()
    _unfinished.clear()
