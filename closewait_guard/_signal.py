"""A report to stderr upon a signal, also while the main thread is stuck in a C call.

Python runs signal handlers in the main thread only, between two bytecodes. The interpreter's own C
handler writes the signal's number to the wakeup descriptor at once, though: while a monitor runs,
a thread listens there, if nobody else does.
"""

from __future__ import annotations

import _thread
import os
import signal as signals
import threading
from collections.abc import Callable
from contextlib import suppress
from types import BuiltinFunctionType, FrameType
from typing import Any

from closewait_guard.exceptions import ConfigurationError

__all__ = ["Listening", "SignalReport"]


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
        self._listening: Listening | None = None
        try:
            # What C code has installed cannot be put back: getsignal() says None.
            self._previous = signals.getsignal(signum)
            if self._previous is not None:
                signals.signal(signum, self._handle)
        except (ValueError, OSError) as error:
            name = signals.Signals(signum).name
            raise ConfigurationError(f"signal: {name} cannot be handled: {error}") from error
        if self._previous is None:
            raise ConfigurationError(
                f"signal: {signals.Signals(signum).name} is handled by native code already"
            )

    def stop(self) -> None:
        """Put back the handler that was there; beneath somebody else's, only fall silent."""
        self._is_silent = True
        if self._listening is not None:
            self._listening.stop()
        # Only the main thread may change handlers; elsewhere ours stays, and hands on.
        with suppress(ValueError):
            if signals.getsignal(self._signum) == self._handle:
                signals.signal(self._signum, self._previous)

    def listening(self) -> Listening | None:
        """A thread that hears the signal at once; None where nobody can."""
        self._listening = Listening.begun(self._signum, self._tell_unless_silent)
        return self._listening

    def _handle(self, signum: int, frame: FrameType | None) -> Any:
        if self._listening is None or not self._listening.has_heard():
            # Not threading.Thread, whose lock the main thread may be holding at this moment.
            _thread.start_new_thread(self._tell_unless_silent, ())
        return self._previous(signum, frame) if callable(self._previous) else None

    def _tell_unless_silent(self) -> None:
        if not self._is_silent:
            self._tell()


class Listening:
    """The thread that reads the wakeup descriptor."""

    def __init__(self, signum: int, tell: Callable[[], object]) -> None:
        self._signum = signum
        self._tell = tell
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._pid = os.getpid()
        self._thread = threading.Thread(
            target=self._listen, name="closewait-guard-signal", daemon=True
        )

    @classmethod
    def begun(cls, signum: int, tell: Callable[[], object]) -> Listening | None:
        """Begin to listen, if this is the main thread and nobody else uses the descriptor."""
        if threading.current_thread() is not threading.main_thread():
            return None
        if not isinstance(_thread.start_new_thread, BuiltinFunctionType):
            # Green threads: one that waits in read() would stop all the others.
            return None
        present = _exchanged(-1)
        if present != -1:
            _exchanged(present)
            return None
        listening = cls(signum, tell)
        _exchanged(listening._write)
        listening._thread.start()
        return listening

    def has_heard(self) -> bool:
        """In the main thread: whether the signal being handled has come this way too."""
        if self._write < 0 or self._pid != os.getpid():
            return False
        present = _exchanged(self._write)
        if present not in (-1, self._write):
            _exchanged(present)
        return present == self._write

    def stop(self) -> None:
        """Leave the descriptor to nobody. Outside of the main thread that cannot be done."""
        if self._write < 0 or threading.current_thread() is not threading.main_thread():
            return
        present = _exchanged(-1)
        if present not in (-1, self._write):
            _exchanged(present)
        os.close(self._write)
        self._write = -1
        if self._pid == os.getpid():
            self._thread.join()
        os.close(self._read)

    def _listen(self) -> None:
        while heard := os.read(self._read, 4096):
            if self._signum in heard:
                self._tell()


def _exchanged(fd: int) -> int:
    """Set the wakeup descriptor, and return the one that was set."""
    return signals.set_wakeup_fd(fd, warn_on_full_buffer=False)
