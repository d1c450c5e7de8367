"""The sockets that are open when a guard is installed: nobody has seen them born."""

from __future__ import annotations

import _socket
import socket
from collections.abc import Iterator

from closewait_guard._heap import instances_of, kinds_of
from closewait_guard._story import Story, discard, holds
from closewait_guard._wrappers import SOCKET

__all__ = ["strangers"]

_fileno = _socket.socket.fileno


def strangers(births: dict[int, Story]) -> Iterator[tuple[int, socket.socket]]:
    """The open sockets without a birth, by descriptor; what is known of one before goes."""
    for sock in instances_of(kinds_of(SOCKET)):
        fd = _number_of(sock)
        known = births.get(fd)
        if fd < 0 or (known is not None and holds(known, fd)):
            continue
        if known is not None:
            discard(births, fd, known)
        yield fd, sock


def _number_of(sock: socket.socket) -> int:
    try:
        return _fileno(sock)
    except Exception:
        # Not initialized: made by __new__ alone.
        return -1
