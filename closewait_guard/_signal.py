"""The interpreter's wakeup descriptor, read by a thread: it hears of a signal at once.

The interpreter's C handler writes each signal's number to it, whatever the main thread is stuck in.
There is one for the process, known by number, and it can be looked at only by setting another: an
event loop that has it must miss no signal meanwhile, and a number of ours must never come to stand
for a file of the program's.


A report to stderr upon a signal, also while the main thread is stuck in a C call.

Python runs signal handlers in the main thread only, between two bytecodes. While a monitor runs, a
thread hears of the signal before.
"""

from __future__ import annotations

import _thread
import os
import signal as signals
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import BuiltinFunctionType, FrameType
from typing import TypeAlias

from closewait_guard._descriptors import OwnedDescriptor, owned_pipe
from closewait_guard.exceptions import ConfigurationError

__all__ = [
    "SignalReport",
    "WakeupReader",
]


try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_NOBODY = -1
_MAX_JOIN_SECONDS = 2.0
# No signal has these numbers.
_HANDLED, _END = 0, 255
# A program that closes all descriptors gets the small numbers for what it opens next. Much larger
# ones than these would have each fork copy a larger table.
_FIRST_NUMBER = 1000
_ROOM_BELOW_LIMIT = 16

_Pipe: TypeAlias = tuple[OwnedDescriptor, OwnedDescriptor]


class WakeupReader:
    """The thread.

    Args:
        signum: The signal that it waits for.
        caught: Called in the thread, once for each signal; must not block.
    """

    def __init__(self, signum: int, caught: Callable[[], object]) -> None:
        self._signum = signum
        self._caught = caught
        self._pipe = _take_pipe()
        self._number = self._pipe[1].fileno()
        self._is_stopping = _thread.allocate_lock()
        self._is_reading = _thread.allocate_lock()
        self._unpaired: int | None = None
        self._thread = threading.Thread(
            target=self._read, name="closewait-guard-signal", daemon=True
        )

    @classmethod
    def start_if_free(cls, signum: int, caught: Callable[[], object]) -> WakeupReader | None:
        """Begin, if this is the main thread and nobody else has the descriptor."""
        if not _is_main_thread() or not hasattr(signals, "pthread_kill"):
            return None
        if not isinstance(_thread.start_new_thread, BuiltinFunctionType):
            # Green threads: one that waits in read() would stop all the others.
            return None
        if _wake_main_thread() is None:
            # A number that somebody has closed could not be taken back in time.
            return None
        # With no room for a pipe or a thread, the handler alone must do.
        with suppress(OSError, RuntimeError):
            reader = cls(signum, caught)
            if reader._start():
                return reader
        return None

    @property
    def running(self) -> bool:
        """Whether it hears anything."""
        return not self._is_stopping.locked()

    def handled(self) -> bool:
        """From the signal's handler: whether `caught` is left to the thread.

        Only the handler knows of a signal while somebody else has the descriptor.
        """
        if not self.running:
            return False
        try:
            os.write(self._pipe[1].fileno(), bytes([_HANDLED]))
        except BlockingIOError:
            return False
        except OSError:
            self._stop()
            return False
        return True

    def stop(self) -> None:
        """Leave the descriptor to nobody, or to whoever has it by now. Idempotent."""
        self._stop()
        if self._thread is not threading.current_thread():
            self._thread.join(_MAX_JOIN_SECONDS)

    def after_fork(self) -> None:
        """In the child, where nobody reads; the pipe is the parent's."""
        self._is_stopping.acquire(blocking=False)
        _waiting.clear()
        present = _set_wakeup_fd(_NOBODY)
        if present not in (_NOBODY, self._number):
            _set_wakeup_fd(present)
        _close(self._pipe)

    def _start(self) -> bool:
        if not _replace(self._pipe, (_NOBODY, self._number), self._number):
            _close(self._pipe)
            return False
        os.set_blocking(self._pipe[0].fileno(), True)
        self._is_reading.acquire()
        try:
            self._thread.start()
        except RuntimeError:
            self._release()
            raise
        return True

    def _read(self) -> None:
        with suppress(OSError):
            while heard := os.read(self._pipe[0].fileno(), 4096):
                self._hear(heard)
                if not self.running:
                    break
        self._is_reading.release()
        # Unless this was told to end, somebody has closed the pipe.
        self._stop()

    def _hear(self, heard: bytes) -> None:
        """The signal, and its handler later: the same one. A handler alone: a signal too."""
        is_new = False
        for number in heard:
            if number not in (self._signum, _HANDLED):
                continue
            is_pair = self._unpaired is not None and self._unpaired != number
            is_new |= not is_pair
            self._unpaired = None if is_pair else number
        if self._unpaired == _HANDLED:
            # Another thread may have caught the signal, and be a moment late; not longer.
            self._unpaired = None
        if is_new:
            self._caught()

    def _stop(self) -> None:
        # Not by `threading`, whose locks the main thread may hold where a handler interrupts it.
        if not self._is_stopping.acquire(blocking=False):
            return
        with suppress(OSError):
            os.write(self._pipe[1].fileno(), bytes([_END]))
        if self._is_reading.acquire(timeout=_MAX_JOIN_SECONDS):
            _call_in_main_thread(self._release)

    def _release(self) -> None:
        global _spare
        if _replace(self._pipe, (_NOBODY, self._number), _NOBODY):
            _close(self._pipe)
        else:
            # Who took the descriptor from us may give it back, as trio and uvloop do.
            _spare = os.getpid(), self._pipe


_spare: tuple[int, _Pipe] | None = None


def _take_pipe() -> _Pipe:
    """The one that somebody may give the wakeup descriptor back to, else a new one."""
    global _spare
    spare, _spare = _spare, None
    if spare is not None and spare[0] == os.getpid() and _is_open(spare[1]):
        return spare[1]
    pipe = owned_pipe(_first_number())
    os.set_blocking(pipe[1].fileno(), False)
    return pipe


def _first_number() -> int:
    if resource is None:
        return 3
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _FIRST_NUMBER
    return max(3, min(_FIRST_NUMBER, limit - _ROOM_BELOW_LIMIT))


def _is_open(pipe: _Pipe) -> bool:
    return all(end.fileno() >= 0 for end in pipe)


def _close(pipe: _Pipe) -> None:
    for end in pipe:
        end.close()


def _replace(pipe: _Pipe, expected: tuple[int, ...], wanted: int) -> bool:
    """Set the wakeup descriptor if what is set is expected; else leave it, and lose no signal.

    Args:
        pipe: Takes what comes while it is found out what is set. Nobody reads it.
        expected: What may be replaced.
        wanted: What to set.
    """
    reading, writing = pipe
    with suppress(OSError):
        os.set_blocking(reading.fileno(), False)
        os.read(reading.fileno(), 1 << 16)
    present = _set_wakeup_fd(writing.fileno() if _is_open(pipe) else _NOBODY)
    if present in expected:
        _set_wakeup_fd(wanted)
        return True
    try:
        _set_wakeup_fd(present)
    except (OSError, ValueError):
        # It has been closed without being given up.
        _set_wakeup_fd(_NOBODY)
    with suppress(OSError):
        os.write(present, os.read(reading.fileno(), 4096))
    return False


def _set_wakeup_fd(fd: int) -> int:
    """In the main thread: set it, and return what was set."""
    return signals.set_wakeup_fd(fd, warn_on_full_buffer=False)


def _is_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


_waiting: list[Callable[[], None]] = []


def _call_in_main_thread(function: Callable[[], None]) -> None:
    """At once if this is it, else as soon as it runs Python code."""
    if _is_main_thread():
        function()
    elif (wake := _wake_main_thread()) is not None:
        _waiting.append(function)
        wake()


@cache
def _wake_main_thread() -> Callable[[], object] | None:
    """What has the main thread call all that waits; a signal would write to the descriptor."""
    try:
        import ctypes

        add = ctypes.pythonapi.Py_AddPendingCall
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(_call_waiting)
    except (ImportError, AttributeError, MemoryError):
        return None
    return lambda: add(callback, None)


def _call_waiting(_: object) -> int:
    while _waiting:
        with suppress(Exception):
            _waiting.pop()()
    return 0


class SignalReport:
    """Calls `tell` in a thread of its own upon a signal; then the handler that was there before.

    Args:
        signum: The signal.
        tell: What to do; must raise nothing.

    Raises:
        ConfigurationError: This is not the main thread, or the signal cannot be caught.
    """

    def __init__(self, signum: int, tell: Callable[[], object]) -> None:
        self._signum = signum
        self._tell = tell
        self._is_silent = False
        self._requests = _Requests(self._tell_unless_silent)
        self._reader: WakeupReader | None = None
        try:
            # What C code has installed cannot be put back: getsignal() says None.
            self._previous = signals.getsignal(signum)
            if self._previous is not None:
                signals.signal(signum, self._handle)
        except (ValueError, OSError) as error:
            raise ConfigurationError(
                f"signal: {_name(signum)} cannot be handled: {error}"
            ) from error
        if self._previous is None:
            raise ConfigurationError(f"signal: {_name(signum)} is handled by native code already")

    def stop(self) -> None:
        """Put back the handler that was there; beneath somebody else's, only fall silent."""
        self._is_silent = True
        if self._reader is not None:
            self._reader.stop()
        # Only the main thread may change handlers; elsewhere ours stays, and hands on.
        with suppress(ValueError):
            if signals.getsignal(self._signum) == self._handle:
                signals.signal(self._signum, self._previous)

    def start_reading(self) -> WakeupReader | None:
        """Have a thread hear of the signal at once; None where that cannot be, or is so already."""
        if self._reader is None or not self._reader.running:
            self._reader = WakeupReader.start_if_free(self._signum, self._requests.add)
            return self._reader
        return None

    def after_fork(self) -> None:
        """In the child, which has no thread but its own."""
        self._requests = _Requests(self._tell_unless_silent)
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.after_fork()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        try:
            with suppress(Exception):
                reader = self._reader
                if reader is None or not reader.handled():
                    self._requests.add()
        finally:
            # Also when the handler of another signal raises in the middle of this one.
            if callable(self._previous):
                self._previous(signum, frame)

    def _tell_unless_silent(self) -> None:
        if not self._is_silent:
            self._tell()


class _Requests:
    """Reports that are asked for: one at a time, in a thread that lasts as long as it has any."""

    def __init__(self, report: Callable[[], object]) -> None:
        self._report = report
        self._is_asked = False
        self._is_reporting = _thread.allocate_lock()

    def add(self) -> None:
        """Ask for one more; what is asked for during a report is one more after it."""
        self._is_asked = True
        if not self._is_reporting.locked():
            # Not threading.Thread, whose lock the main thread may be holding at this moment.
            # Without a thread to be had, it stays asked for until the next signal.
            with suppress(RuntimeError):
                _thread.start_new_thread(self._work, ())

    def _work(self) -> None:
        # Taken here, and not in the handler, which another's that raises may interrupt anywhere.
        while self._is_asked and self._is_reporting.acquire(blocking=False):
            try:
                self._is_asked = False
                self._report()
            finally:
                self._is_reporting.release()


def _name(signum: int) -> str:
    """Those of real time have no name."""
    try:
        return signals.Signals(signum).name
    except ValueError:
        return str(signum)
