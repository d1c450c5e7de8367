"""Keys as they are typed, on a terminal; on anything else there are none."""

from __future__ import annotations

import os
import select
import sys
import time
from typing import Any, Self

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = tty = None  # type: ignore[assignment]

__all__ = ["Keyboard"]


class Keyboard:
    """While the block lasts, keys come one by one and are not shown."""

    def __init__(self) -> None:
        self._fd = -1
        self._before: list[Any] = []

    def __enter__(self) -> Self:
        try:
            if termios is not None and sys.stdin.isatty():
                fd = sys.stdin.fileno()
                self._before = termios.tcgetattr(fd)
                tty.setcbreak(fd)
                self._fd = fd
        except (OSError, ValueError, AttributeError):
            # No stdin, or one that was closed: then there are no keys.
            self._fd = -1
        return self

    def __exit__(self, *failure: object) -> None:
        if self._fd >= 0:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def key(self, seconds: float) -> str:
        """The key that is typed within some time; empty if none is."""
        if self._fd < 0:
            time.sleep(seconds)
            return ""
        if not select.select([self._fd], [], [], seconds)[0]:
            return ""
        typed = os.read(self._fd, 1)
        if not typed:
            # The terminal has gone away.
            self._fd = -1
        return typed.decode("ascii", "replace")
