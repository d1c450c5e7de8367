"""A report to stderr upon a signal, even while the main thread is stuck in a C call.

Python runs signal handlers in the main thread only, between two bytecodes. But the interpreter's C
handler writes each signal's number to the wakeup descriptor at once, whatever the main thread does,
and while a monitor runs, a thread reads that descriptor.

There is one wakeup descriptor for the process, known by its number, and it can be looked up only by
setting another: an event loop that has set it must miss no signal meanwhile, and a number of ours
must never come to mean a file of the program's.
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

from closewait_guard._cpython import main_thread_waker
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

_NO_FD = -1
_MAX_JOIN_SECONDS = 2.0
# No signal has these numbers.
_HANDLER_RAN, _END = 0, 255
# A program that closes all descriptors gets small numbers for what it opens next. With much larger
# ones than this each fork would copy a larger table.
_FIRST_NUMBER = 1000
_ROOM_BELOW_LIMIT = 16

_Pipe: TypeAlias = tuple[OwnedDescriptor, OwnedDescriptor]


class WakeupReader:
    """A thread that reads the wakeup descriptor.

    Args:
        signum: The signal that it waits for.
        on_signal: Called in the thread, once for each signal; must not block.
    """

    def __init__(self, signum: int, on_signal: Callable[[], object]) -> None:
        self._signum = signum
        self._on_signal = on_signal
        self._pipe = _take_pipe()
        self._number = self._pipe[1].fileno()
        self._is_stopping = _thread.allocate_lock()
        self._is_reading = _thread.allocate_lock()
        self._is_late = False
        self._unpaired: int | None = None
        self._thread = threading.Thread(
            target=self._read, name="closewait-guard-signal", daemon=True
        )

    @classmethod
    def start_if_free(cls, signum: int, on_signal: Callable[[], object]) -> WakeupReader | None:
        """Begin, if this is the main thread and the program has set no wakeup descriptor."""
        if not _is_main_thread() or not hasattr(signals, "pthread_kill"):
            return None
        if not isinstance(_thread.start_new_thread, BuiltinFunctionType):
            # Green threads: one that waits in read() would stop all the others.
            return None
        if _wake_main_thread() is None:
            # If the program closes the descriptor, its number could not be unset in time.
            return None
        # Where no pipe or thread can be made, the handler works alone.
        with suppress(OSError, RuntimeError):
            reader = cls(signum, on_signal)
            if reader._start():
                return reader
        return None

    @property
    def running(self) -> bool:
        """Whether it reads."""
        return not self._is_stopping.locked()

    def caught_signal(self) -> bool:
        """Called by the signal's handler: whether the thread will call `on_signal`.

        While the program has set another wakeup descriptor, only the handler notices a signal.
        """
        if not self.running:
            return False
        try:
            os.write(self._pipe[1].fileno(), bytes([_HANDLER_RAN]))
        except BlockingIOError:
            return False
        except OSError:
            self._stop()
            return False
        return True

    def stop(self) -> None:
        """Unset the wakeup descriptor, unless the program has set it meanwhile. Idempotent."""
        self._stop()
        if self._thread is not threading.current_thread():
            self._thread.join(_MAX_JOIN_SECONDS)

    def after_fork(self) -> None:
        """In the child, which has no thread that reads; the pipe is the parent's."""
        self._is_stopping.acquire(blocking=False)
        _main_thread_calls.clear()
        current = _set_wakeup_fd(_NO_FD)
        if current not in (_NO_FD, self._number):
            _set_wakeup_fd(current)
        _close(self._pipe)

    def _start(self) -> bool:
        if not _swap_wakeup_fd(self._pipe, (_NO_FD, self._number), self._number):
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
            while numbers := os.read(self._pipe[0].fileno(), 4096):
                self._handle_numbers(numbers)
                if not self.running:
                    break
        self._is_reading.release()
        # Unless it was stopped, the program has closed the pipe.
        self._stop()
        self._release_if_late()

    def _handle_numbers(self, numbers: bytes) -> None:
        """Count the signal and its handler, which runs later, once. A handler alone counts too."""
        is_new = False
        for number in numbers:
            if number not in (self._signum, _HANDLER_RAN):
                continue
            is_pair = self._unpaired is not None and self._unpaired != number
            is_new |= not is_pair
            self._unpaired = None if is_pair else number
        if self._unpaired == _HANDLER_RAN:
            # If another thread caught the signal, its number may come a moment later; not longer.
            self._unpaired = None
        if is_new:
            self._on_signal()

    def _stop(self) -> None:
        # Not with `threading`: a handler may interrupt the main thread while it holds those locks.
        if not self._is_stopping.acquire(blocking=False):
            return
        with suppress(OSError):
            os.write(self._pipe[1].fileno(), bytes([_END]))
        if self._is_reading.acquire(timeout=_MAX_JOIN_SECONDS):
            _call_in_main_thread(self._release)
        else:
            self._is_late = True
            self._release_if_late()

    def _release_if_late(self) -> None:
        """Release what `_stop` did not wait for; the lock lets only one of two threads do it."""
        if self._is_late and self._is_reading.acquire(blocking=False):
            _call_in_main_thread(self._release)

    def _release(self) -> None:
        global _spare
        if _swap_wakeup_fd(self._pipe, (_NO_FD, self._number), _NO_FD):
            _close(self._pipe)
        else:
            # The code that replaced our descriptor may set it again, as trio and uvloop do.
            _spare = os.getpid(), self._pipe


_spare: tuple[int, _Pipe] | None = None


def _take_pipe() -> _Pipe:
    """The pipe that the program may set as wakeup descriptor again, else a new one."""
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


def _swap_wakeup_fd(pipe: _Pipe, expected: tuple[int, ...], wanted: int) -> bool:
    """Set the wakeup descriptor if the present one is expected; else leave it, and lose no signal.

    Args:
        pipe: Takes the signals that arrive meanwhile. No thread reads it now.
        expected: The descriptors that may be replaced.
        wanted: The descriptor to set.
    """
    reading, writing = pipe
    with suppress(OSError):
        os.set_blocking(reading.fileno(), False)
        os.read(reading.fileno(), 1 << 16)
    current = _set_wakeup_fd(writing.fileno() if _is_open(pipe) else _NO_FD)
    if current in expected:
        _set_wakeup_fd(wanted)
        return True
    try:
        _set_wakeup_fd(current)
    except (OSError, ValueError):
        # It has been closed without being unset.
        _set_wakeup_fd(_NO_FD)
    with suppress(OSError):
        os.write(current, os.read(reading.fileno(), 4096))
    return False


def _set_wakeup_fd(fd: int) -> int:
    """In the main thread: set it, and return the one before."""
    return signals.set_wakeup_fd(fd, warn_on_full_buffer=False)


def _is_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


_main_thread_calls: list[Callable[[], None]] = []


def _call_in_main_thread(function: Callable[[], None]) -> None:
    """At once if this is the main thread, else as soon as that runs Python code."""
    if _is_main_thread():
        function()
    elif (wake := _wake_main_thread()) is not None:
        _main_thread_calls.append(function)
        wake()


@cache
def _wake_main_thread() -> Callable[[], object] | None:
    """A function that has the main thread make the calls, without a signal."""
    return main_thread_waker(_make_calls)


def _make_calls(_: object) -> int:
    while _main_thread_calls:
        with suppress(Exception):
            _main_thread_calls.pop()()
    return 0


class SignalReport:
    """Calls `report` in a thread upon a signal; then the handler that was there before.

    Args:
        signum: The signal.
        report: Makes and prints the report; must raise nothing.

    Raises:
        ConfigurationError: This is not the main thread, or the signal cannot be caught.
    """

    def __init__(self, signum: int, report: Callable[[], object]) -> None:
        self._signum = signum
        self._report = report
        self._has_stopped = False
        self._requests = _Requests(self._report_unless_stopped)
        self._reader: WakeupReader | None = None
        try:
            # A handler of C code cannot be restored: getsignal() returns None.
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
        """Restore the handler that was there, unless another was set; make no more reports."""
        self._has_stopped = True
        if self._reader is not None:
            self._reader.stop()
        # Only the main thread may set handlers; elsewhere ours stays, and calls the one before.
        with suppress(ValueError):
            if signals.getsignal(self._signum) == self._handle:
                signals.signal(self._signum, self._previous)

    def start_reading(self) -> WakeupReader | None:
        """Have a thread read the signal at once; None where it cannot, or does so already."""
        if self._reader is None or not self._reader.running:
            self._reader = WakeupReader.start_if_free(self._signum, self._requests.add)
            return self._reader
        return None

    def after_fork(self) -> None:
        """In the child, which has no thread but its own."""
        self._requests = _Requests(self._report_unless_stopped)
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.after_fork()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        try:
            with suppress(Exception):
                reader = self._reader
                if reader is None or not reader.caught_signal():
                    self._requests.add()
        finally:
            # Also when the handler of another signal raises in the middle of this one.
            if callable(self._previous):
                self._previous(signum, frame)

    def _report_unless_stopped(self) -> None:
        if not self._has_stopped:
            self._report()


class _Requests:
    """Requests for reports: one at a time, in a thread that ends when none is left."""

    def __init__(self, report: Callable[[], object]) -> None:
        self._report = report
        self._is_requested = False
        self._is_reporting = _thread.allocate_lock()

    def add(self) -> None:
        """Request a report; one that is requested during a report is made after it."""
        self._is_requested = True
        if not self._is_reporting.locked():
            # Not threading.Thread, whose lock the main thread may be holding at this moment.
            # If no thread can be started, it stays requested until the next signal.
            with suppress(RuntimeError):
                _thread.start_new_thread(self._work, ())

    def _work(self) -> None:
        # Not in the handler, which another handler that raises may interrupt anywhere.
        while self._is_requested and self._is_reporting.acquire(blocking=False):
            try:
                self._is_requested = False
                self._report()
            finally:
                self._is_reporting.release()


def _name(signum: int) -> str:
    """Real-time signals have no name."""
    try:
        return signals.Signals(signum).name
    except ValueError:
        return str(signum)
