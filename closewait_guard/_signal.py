"""A report to stderr upon a signal, also while the main thread is stuck in a C call.

Python runs signal handlers in the main thread only, between two bytecodes. While a monitor runs, a
thread hears of the signal before.
"""

from __future__ import annotations

import _thread
import signal as signals
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from closewait_guard._wakeup import WakeupReader
from closewait_guard.exceptions import ConfigurationError

__all__ = ["SignalReport"]


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
