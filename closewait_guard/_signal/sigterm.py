"""Call functions before the default action of SIGTERM ends the process.

A handler of ours stands where the program has left the default action, and whenever it restores
that: servers restore it after their own shutdown, and raise the signal again. To the program
`signal.signal()` and `signal.getsignal()` show the default, because some set a handler only where
there is none.
"""

from __future__ import annotations

import _thread
import signal as signals
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from signal import SIG_DFL, SIGTERM
from types import BuiltinFunctionType, FrameType
from typing import Any

__all__ = [
    "before_sigterm",
    "delayed_sigterm",
]


# Service managers kill after 10 s or more.
_MAX_SECONDS = 5.0


def _native(name: str) -> Any:
    """A function of `_thread` as it is without gevent: no handler can wait for a green thread."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return getattr(_thread, name) if monkey is None else monkey.get_original("_thread", name)


_start_thread = _native("start_new_thread")
_allocate_lock = _native("allocate_lock")

_callbacks: list[Callable[[], object]] = []
# The functions of `signal` as they were found, and what restores them.
_set_handler: Callable[[int, Any], Any] = signals.signal
_restore: list[Callable[[], None]] = []


def before_sigterm(callback: Callable[[], object]) -> Callable[[], None]:
    """Call `callback` in a thread before SIGTERM ends the process; returns what undoes this.

    Then the process ends by that signal as it would have. Handlers of the program are left alone.
    """
    _callbacks.append(callback)
    # Elsewhere a process is not ended by signals.
    if hasattr(signals, "pthread_sigmask") and not _restore:
        _wrap_functions()
        # In another thread than the main one it cannot be set; the program may do so later.
        with suppress(ValueError, OSError):
            if signals.getsignal(SIGTERM) is SIG_DFL:
                _set_handler(SIGTERM, _handle)

    def undo() -> None:
        with suppress(ValueError):
            _callbacks.remove(callback)
        if not _callbacks:
            _unwrap_functions()

    return undo


@contextmanager
def delayed_sigterm() -> Iterator[None]:
    """Let a SIGTERM that would call the callbacks end the process after the block instead.

    A second one ends it at once. For a report that is being made already.
    """
    delay = [False]
    _delays.append(delay)
    try:
        yield
    finally:
        _delays.remove(delay)
        if delay[0]:
            signals.raise_signal(SIGTERM)


_delays: list[list[bool]] = []


def _wrap_functions() -> None:
    global _set_handler
    set_handler, get_handler = signals.signal, signals.getsignal

    @wraps(set_handler)
    def signal(signalnum: int, handler: Any) -> Any:
        # By number too: SIG_DFL is 0.
        is_default = isinstance(handler, int) and handler == SIG_DFL
        if signalnum == SIGTERM and is_default and _callbacks:
            handler = _handle
        return _as_default(set_handler(signalnum, handler))

    @wraps(get_handler)
    def getsignal(signalnum: int) -> Any:
        return _as_default(get_handler(signalnum))

    def restore() -> None:
        # Only the main thread may set it; elsewhere ours stays, and does what the default does.
        with suppress(ValueError):
            if get_handler(SIGTERM) is _handle:
                set_handler(SIGTERM, SIG_DFL)
        if signals.signal is signal:
            signals.signal = set_handler
        if signals.getsignal is getsignal:
            signals.getsignal = get_handler

    _set_handler = set_handler
    signals.signal, signals.getsignal = signal, getsignal
    _restore.append(restore)


def _unwrap_functions() -> None:
    while _restore:
        _restore.pop()()


def _as_default(handler: Any) -> Any:
    return SIG_DFL if handler is _handle else handler


def _handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
    if _delays:
        _delays[-1][0] = True
        _set_handler(SIGTERM, SIG_DFL)
        return
    try:
        # A second one ends the process at once.
        _set_handler(SIGTERM, SIG_DFL)
        _call_all()
    finally:
        # Also when the handler of another signal raises meanwhile, as that of SIGINT does.
        mask = signals.pthread_sigmask(signals.SIG_UNBLOCK, {SIGTERM})
        signals.raise_signal(SIGTERM)
    # The kernel ignores it for the first process of a container, which continues as without us.
    signals.pthread_sigmask(signals.SIG_SETMASK, mask)
    if _callbacks:
        _set_handler(SIGTERM, _handle)


def _call_all() -> None:
    """In a thread: the main thread may hold any lock at this moment."""
    callbacks, is_done = _callbacks.copy(), _allocate_lock()
    is_done.acquire()

    def call() -> None:
        try:
            for callback in callbacks:
                with suppress(Exception):
                    callback()
        finally:
            is_done.release()

    if not isinstance(_start_thread, BuiltinFunctionType):
        call()
        return
    # If no thread can be started, there is no report.
    with suppress(RuntimeError):
        _start_thread(call, ())
        is_done.acquire(timeout=_MAX_SECONDS)
