"""A short look through a descriptor that belongs to no socket object."""

from __future__ import annotations

import _socket
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from closewait_guard._descriptor import OwnedDescriptor

__all__ = ["borrowed"]


@contextmanager
def borrowed(fd: int) -> Iterator[_socket.socket]:
    """A socket object on a copy of a descriptor; the copy is closed afterwards.

    Raises:
        OSError: The descriptor is closed, is no socket, or there is no room for a copy.
    """
    with _on_copy(fd, socket.SOCK_STREAM) as sock:
        kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        if kind == socket.SOCK_STREAM:
            yield sock
            return
    with _on_copy(fd, kind) as sock:
        yield sock


@contextmanager
def _on_copy(fd: int, kind: int) -> Iterator[_socket.socket]:
    # With a default timeout set, the constructor would make the shared description non-blocking,
    # unless it is told that it already is.
    flag = getattr(socket, "SOCK_NONBLOCK", 0)
    copy = OwnedDescriptor(os.dup(fd))
    try:
        # No keyword: Python 3.12 keeps the names of a C function's arguments for the whole process
        # where they are first used, and aborts at its end if that was an isolated interpreter.
        sock = _socket.socket(-1, kind | flag, -1, copy.fileno())
        try:
            yield sock
        finally:
            # The object would close whatever has its number by now.
            sock.detach()
    finally:
        copy.close()
