"""What the probes that poll have in common: the poller, and the lengths of a socket's queues."""

from __future__ import annotations

import sys
from collections.abc import Collection

from closewait_guard._probe._select import select

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = termios = None  # type: ignore[assignment]

__all__ = ["PollPoller", "unread", "unsent"]


_FIONREAD: int = getattr(termios, "FIONREAD", 0)
_TIOCOUTQ: int = getattr(termios, "TIOCOUTQ", 0)


class PollPoller:
    """Asks for some events, and for hang-ups and errors, which come unasked."""

    def __init__(self, events: int) -> None:
        self._poll = select.poll()
        self._events = events
        self._given: object = None
        self._watched: set[int] = set()

    def suspects(self, fds: Collection[int]) -> dict[int, int]:
        if fds is not self._given:
            wanted = set(fds)
            for fd in self._watched - wanted:
                self._poll.unregister(fd)
            for fd in wanted - self._watched:
                self._poll.register(fd, self._events)
            self._given, self._watched = fds, wanted
        return dict(self._poll.poll(0))


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
    except OSError:
        return None
