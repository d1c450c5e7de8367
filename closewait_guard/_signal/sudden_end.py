"""Call functions before SIGTERM, `os._exit()` or `exec` ends the program, without exit functions.

A handler of ours stands where the program has left the default action of SIGTERM, and whenever it
restores that: servers restore it after their own shutdown, and raise the signal again. To the
program `signal.signal()` and `signal.getsignal()` show the default, because some set a handler only
where there is none. `os._exit()` and `exec` are wrapped; C code that calls them is not seen.

A handler waits until the main thread has returned from C code. Where the package has its extension,
the kernel ends the process if that takes long.
"""

from __future__ import annotations

import _thread
import os
import signal as signals
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from signal import SIG_DFL, SIGTERM
from time import monotonic
from types import BuiltinFunctionType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from closewait_guard._cpython import native_handler, running_loop
from closewait_guard._threads import in_child

if TYPE_CHECKING:
    from closewait_guard._signal import _deadline
else:
    try:
        from closewait_guard._signal import _deadline
    except ImportError:
        _deadline = None

__all__ = [
    "SuddenEnd",
    "before_sudden_end",
    "delayed_sigterm",
    "restore_default",
]


# Service managers kill after 10 s or more.
_MAX_SECONDS = 5.0
# For the main thread to come back to Python code.
_SECONDS_TO_BEGIN = 2.0
# Pools and servers send a worker two in a row: `Process.terminate()`, and again as they exit.
_SECONDS_FOR_REPEATS = 1.0


def _native(name: str) -> Any:
    """A function of `_thread` as it is without gevent: no handler can wait for a green thread."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return getattr(_thread, name) if monkey is None else monkey.get_original("_thread", name)


_start_thread = _native("start_new_thread")
_allocate_lock = _native("allocate_lock")


class SuddenEnd(NamedTuple):
    """How the program ends.

    Attributes:
        is_exec: By `exec`: another program takes its place in the process.
        is_interrupted: In the middle of its work, which goes on in another thread or an event loop.
    """

    is_exec: bool = False
    is_interrupted: bool = False


class _Callback(NamedTuple):
    before: Callable[[SuddenEnd], object]
    has_failed: Callable[[], object] | None


_callbacks: list[_Callback] = []
# Held by the thread that calls them.
_calling = _allocate_lock()
# The functions of `signal` as they were found, and what restores them.
_set_handler: Callable[[int, Any], Any] = signals.signal
_get_handler: Callable[[int], Any] = signals.getsignal
_restore: list[Callable[[], None]] = []
# What our handler is in C.
_handle_in_c: int | None = None


def before_sudden_end(
    before: Callable[[SuddenEnd], object], has_failed: Callable[[], object] | None = None
) -> Callable[[], None]:
    """Call `before` in a thread before the process ends suddenly; returns what undoes this.

    Then the process ends as it would have. Handlers of the program are left alone.

    Args:
        before: May be called again, for another end that comes meanwhile.
        has_failed: Called if the end has failed, and the process goes on.
    """
    callback = _Callback(before, has_failed)
    _callbacks.append(callback)
    if not _restore:
        _wrap_ends()
        # Elsewhere a process is not ended by signals.
        if hasattr(signals, "pthread_sigmask"):
            _wrap_functions()
            # In another thread than the main one it cannot be set; the program may do so later.
            with suppress(ValueError, OSError):
                # C code of the program may handle it, such as faulthandler.
                if signals.getsignal(SIGTERM) is SIG_DFL and not native_handler(SIGTERM):
                    _set_ours()

    def undo() -> None:
        with suppress(ValueError):
            _callbacks.remove(callback)
        if not _callbacks:
            _unwrap_functions()

    return undo


def restore_default() -> None:
    """Set SIGTERM back to its default, if no callback needs ours any more.

    It is done with the last of them, but only the main thread may: where another has undone that,
    ours stays, and does what the default does, until this is called.
    """
    with suppress(ValueError):
        # C code that has come before ours calls it.
        is_called_by_others = native_handler(SIGTERM) not in (_handle_in_c, 0)
        if not _callbacks and _get_handler(SIGTERM) is _handle and not is_called_by_others:
            _set_handler(SIGTERM, SIG_DFL)


@contextmanager
def delayed_sigterm() -> Iterator[None]:
    """Let a SIGTERM that would call the callbacks end the process after the block instead.

    A second one that is sent later than at once ends it. For a report that is being made already.
    """
    delay = [False]
    _delays.append(delay)
    try:
        yield
    finally:
        # A forked child has none.
        with suppress(ValueError):
            _delays.remove(delay)
        if delay[0]:
            _end_by_sigterm()


_delays: list[list[bool]] = []
# When SIGTERM came that ends the process.
_came_at: float | None = None


def _wrap_functions() -> None:
    global _set_handler, _get_handler
    set_handler, get_handler = signals.signal, signals.getsignal

    @wraps(set_handler)
    def signal(signalnum: int, handler: Any) -> Any:
        # By number too: SIG_DFL is 0.
        is_default = isinstance(handler, int) and handler == SIG_DFL
        if signalnum != SIGTERM:
            return set_handler(signalnum, handler)
        if is_default and _callbacks:
            return _as_default(_set_ours())
        found = set_handler(signalnum, handler)
        if _deadline is not None:
            # One that came at this moment is for the program's handler.
            _deadline.cancel()
        return _as_default(found)

    @wraps(get_handler)
    def getsignal(signalnum: int) -> Any:
        return _as_default(get_handler(signalnum))

    def restore() -> None:
        restore_default()
        if signals.signal is signal:
            signals.signal = set_handler
        if signals.getsignal is getsignal:
            signals.getsignal = get_handler

    _set_handler, _get_handler = set_handler, get_handler
    signals.signal, signals.getsignal = signal, getsignal
    _restore.append(restore)


def _unwrap_functions() -> None:
    while _restore:
        _restore.pop()()


def _set_ours() -> Any:
    """Set it, and return the one before."""
    global _handle_in_c
    found = _set_handler(SIGTERM, _handle)
    if _deadline is not None:
        _deadline.cancel()
        _deadline.set_in_advance(_SECONDS_TO_BEGIN, _SECONDS_FOR_REPEATS)
    _handle_in_c = native_handler(SIGTERM)
    return found


def _as_default(handler: Any) -> Any:
    return SIG_DFL if handler is _handle else handler


def _handle(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
    global _came_at
    if _came_at is not None:
        if monotonic() - _came_at >= _SECONDS_FOR_REPEATS:
            _end_by_sigterm()
        return
    _came_at = monotonic()
    if _deadline is not None:
        _deadline.postpone(_MAX_SECONDS + _SECONDS_TO_BEGIN)
    if _delays:
        _delays[-1][0] = True
        return
    try:
        _call_all(SuddenEnd(is_interrupted=True))
    finally:
        # Also when the handler of another signal raises meanwhile, as that of SIGINT does.
        mask = signals.pthread_sigmask(signals.SIG_UNBLOCK, {SIGTERM})
        _end_by_sigterm()
    # The kernel ignores it for the first process of a container, which continues as without us.
    signals.pthread_sigmask(signals.SIG_SETMASK, mask)
    _call_after_failure()
    if _callbacks:
        _set_ours()


def _end_by_sigterm() -> None:
    global _came_at
    _came_at = None
    # In another thread than the main one ours stays, which then ends the process.
    with suppress(ValueError):
        if _get_handler(SIGTERM) is _handle:
            _set_handler(SIGTERM, SIG_DFL)
    signals.raise_signal(SIGTERM)


def _call_all(how: SuddenEnd, end: Callable[[], object] | None = None) -> None:
    """In a thread: this one may hold any lock at this moment, or wait for one that holds one.

    Args:
        how: How the program ends.
        end: Ends it, in that thread too, so that no handler of a signal runs in between.
    """
    callbacks, calling, is_done = _callbacks.copy(), _calling, _allocate_lock()
    is_done.acquire()
    # Where another library has wrapped ours, ours stays when it is not needed any more.
    if not callbacks:
        return

    def call() -> None:
        try:
            # Another end may have begun, in another thread.
            with calling:
                for callback in callbacks:
                    with suppress(Exception):
                        callback.before(how)
            if end is not None:
                # What it raises is raised again in the program's own call.
                with suppress(Exception):
                    end()
        finally:
            is_done.release()

    if not isinstance(_start_thread, BuiltinFunctionType):
        call()
        return
    try:
        _start_thread(call, ())
    except RuntimeError:
        # If no thread can be started, there is no report; but during exit functions, where Python
        # 3.12 refuses, none is needed: those of ours do not run in one either.
        if not threading.main_thread().is_alive():
            call()
        return
    is_done.acquire(timeout=_MAX_SECONDS)


@in_child
def _after_fork() -> None:
    """Another thread may have been in the middle of its end."""
    global _calling, _came_at
    _calling, _came_at = _allocate_lock(), None
    _delays.clear()


def _wrap_ends() -> None:
    """Wrap the functions that end the process, in `os` and in the module in C that has them too."""
    for name, end in (("_exit", _exit), ("execv", _exec), ("execve", _exec)):
        found = getattr(os, name, None)
        if found is not None:
            ours = _make_end(found, end)
            # Under both names, so that it is pickled by its name as before.
            for module in (os, sys.modules[os.name]):
                _replace(module, name, found, ours)
            # A program asks here what `execve` may be given.
            if found in os.supports_fd:
                os.supports_fd.add(ours)
                _restore.append(partial(os.supports_fd.discard, ours))


def _make_end(found: Callable[..., Any], end: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(found)
    def ours(*args: Any, **kwargs: Any) -> Any:
        return end(found, *args, **kwargs)

    return ours


def _replace(module: Any, name: str, found: Any, ours: Any) -> None:
    if vars(module).get(name) is not found:
        return
    setattr(module, name, ours)

    def restore() -> None:
        if vars(module).get(name) is ours:
            setattr(module, name, found)

    _restore.append(restore)


def _exit(found: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """A signal that comes from here on would have been too late."""
    with delayed_sigterm():
        _end_by(found, args, kwargs, is_exec=False)


def _exec(found: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    path = args[0] if args else kwargs.get("path")
    if not _can_be_run(path):
        # Each folder of the PATH is tried in turn.
        found(*args, **kwargs)
        return
    _end_by(found, args, kwargs, is_exec=True)


def _end_by(found: Callable[..., Any], args: Any, kwargs: Any, *, is_exec: bool) -> None:
    try:
        is_interrupted = _is_other_thread() or running_loop() is not None
        with _signals_blocked():
            # By exec the next program would inherit what is blocked.
            end = None if is_exec else partial(found, *args, **kwargs)
            _call_all(SuddenEnd(is_exec, is_interrupted), end)
    finally:
        try:
            found(*args, **kwargs)
        finally:
            # It returns only by raising.
            _call_after_failure()


def _is_other_thread() -> bool:
    return threading.get_ident() != threading.main_thread().ident


def _can_be_run(path: Any) -> bool:
    try:
        return isinstance(path, int) or os.access(path, os.X_OK)
    except Exception:
        return False


def _call_after_failure() -> None:
    for callback in _callbacks.copy():
        if callback.has_failed is not None:
            with suppress(Exception):
                callback.has_failed()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Without handlers that run meanwhile, and would not have run."""
    if not hasattr(signals, "pthread_sigmask"):
        yield
        return
    mask = signals.pthread_sigmask(signals.SIG_BLOCK, signals.valid_signals())
    try:
        yield
    finally:
        signals.pthread_sigmask(signals.SIG_SETMASK, mask)
