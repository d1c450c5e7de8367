"""What tells one open descriptor from another of the same number."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TypeAlias

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Identity", "OwnedDescriptor", "identity_of", "inode_of"]

Identity: TypeAlias = tuple[int, int, int]

# C code and child processes write to the numbers below, whatever is open there.
_FIRST_AFTER_STANDARD_STREAMS = 3


def inode_of(fd: int) -> int | None:
    """What tells one open descriptor from the next that gets its number."""
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return None


def identity_of(fd: int) -> Identity | None:
    """The device, inode and kind of what is open at a number; None if nothing is."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)


class OwnedDescriptor:
    """A descriptor that the guard has opened for itself, and uses only while it is still that one.

    A program may close every number that it does not know, as `os.closerange` does; what it opens
    next gets the same numbers. So ask `fileno()` immediately before each use, and end by `close()`.

    Args:
        fd: What has just been opened. It is closed and replaced by a copy where its number is one
            of the standard streams': a program may run without them.
    """

    def __init__(self, fd: int) -> None:
        self._fd = _moved_from_standard_streams(fd)
        self._identity = identity_of(self._fd)

    def fileno(self) -> int:
        """Its number; -1, which every call refuses, as soon as somebody has closed it."""
        if self._fd >= 0 and identity_of(self._fd) != self._identity:
            self._fd = -1
        return self._fd

    def close(self) -> None:
        """Close it, unless somebody has. Idempotent."""
        fd = self.fileno()
        self._fd = -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)


def _moved_from_standard_streams(fd: int) -> int:
    if fd >= _FIRST_AFTER_STANDARD_STREAMS or fcntl is None:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_AFTER_STANDARD_STREAMS)
    finally:
        os.close(fd)
