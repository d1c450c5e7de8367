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

from closewait_guard._interruptions import interrupts

__all__ = [
    "Identity",
    "OwnedDescriptor",
    "identity_of",
    "inode_of",
    "owned_pipe",
    "socket_inode_of",
]

Identity: TypeAlias = tuple[int, int, int]

# C code and child processes write to the numbers below, whatever is open there.
_FIRST_AFTER_STANDARD_STREAMS = 3


def inode_of(fd: int) -> int | None:
    """What tells one open descriptor from the next that gets its number."""
    try:
        return os.fstat(fd).st_ino
    except OSError as error:
        if interrupts(error):
            raise
        return None


def identity_of(fd: int) -> Identity | None:
    """The device, inode and kind of what is open at a number; None if nothing is."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)


def socket_inode_of(fd: int) -> int | None:
    """The inode of an open socket; None if the number is free, or that of something else."""
    identity = identity_of(fd)
    return identity[1] if identity is not None and identity[2] == stat.S_IFSOCK else None


class OwnedDescriptor:
    """A descriptor that the guard has opened for itself, and uses only while it is still that one.

    A program may close every number that it does not know, as `os.closerange` does; what it opens
    next gets the same numbers. So ask `fileno()` immediately before each use, and end by `close()`.

    Args:
        fd: What has just been opened. If its number is too small, it is closed and replaced by a
            copy; without room for one it is closed all the same.
        at_least: The smallest number that it may have: above those of the standard streams, which
            a program may run without.
    """

    def __init__(self, fd: int, at_least: int = _FIRST_AFTER_STANDARD_STREAMS) -> None:
        self._fd = _moved(fd, at_least)
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


def owned_pipe(
    at_least: int = _FIRST_AFTER_STANDARD_STREAMS,
) -> tuple[OwnedDescriptor, OwnedDescriptor]:
    """The reading and the writing end of a new pipe.

    Raises:
        OSError: There is no room for it.
    """
    reading, writing = os.pipe()
    try:
        first = OwnedDescriptor(reading, at_least)
    except OSError:
        os.close(writing)
        raise
    try:
        return first, OwnedDescriptor(writing, at_least)
    except OSError:
        first.close()
        raise


def _moved(fd: int, at_least: int) -> int:
    if fd >= at_least or fcntl is None:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, at_least)
    finally:
        os.close(fd)
