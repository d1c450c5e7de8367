"""Which sockets a thread is reading or writing through a file object at this moment."""

from __future__ import annotations

import _socket
import socket
from collections.abc import Iterator
from types import FrameType

from closewait_guard._objects import field, is_a
from closewait_guard._running_frames import running_frames
from closewait_guard._variables import variable_of

__all__ = ["descriptors_in_use"]

# SocketIO calls the socket, which calls the TLS layer: what blocks is a few calls in.
_DEEPEST = 12


def descriptors_in_use() -> set[int]:
    """Descriptors of closed sockets that are nevertheless in use: `makefile()` was called before.

    A thread that waits for the next line of a quiet stream looks like an abandoned one to the
    kernel; its own stack tells the difference.
    """
    frames = running_frames().values()
    return {fd for frame in frames for fd in _used_by(frame)}


def _used_by(frame: FrameType | None) -> Iterator[int]:
    for _ in range(_DEEPEST):
        if frame is None:
            return
        code = frame.f_code
        if code.co_name in ("readinto", "write") and code.co_filename == socket.__file__:
            sock = field(variable_of(frame, "self"), "_sock")
            if is_a(sock, _socket.socket):
                yield _socket.socket.fileno(sock)
        frame = frame.f_back
