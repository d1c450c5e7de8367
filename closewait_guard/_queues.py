"""How many bytes wait in a socket, by its descriptor."""

from __future__ import annotations

import sys

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = termios = None  # type: ignore[assignment]

from closewait_guard._refusals import refusals

__all__ = ["unread", "unsent"]

_FIONREAD: int = getattr(termios, "FIONREAD", 0)
_TIOCOUTQ: int = getattr(termios, "TIOCOUTQ", 0)


def unread(fd: int) -> int | None:
    """Bytes that wait to be read; None where the platform does not say."""
    return _queued(fd, _FIONREAD)


def unsent(fd: int) -> int | None:
    """Bytes that the peer has not acknowledged; None where the platform does not say."""
    return _queued(fd, _TIOCOUTQ)


def _queued(fd: int, request: int) -> int | None:
    if fcntl is None:
        return None
    try:
        return int.from_bytes(fcntl.ioctl(fd, request, b"\0\0\0\0"), sys.byteorder)
    except Exception as error:
        refusals.note(error)
        return None
