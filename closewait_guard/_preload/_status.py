"""How far a process has come: told to the launcher, and to the program that has forked it."""

from __future__ import annotations

import mmap
import os
import socket
import struct
from contextlib import suppress

from closewait_guard import _patch
from closewait_guard._preload._line import Line
from closewait_guard._stream import print_error

__all__ = ["Status"]


class Status:
    """Waits for the first birth of a socket: what has never opened one has nothing to leak.

    Args:
        line: The line to the launcher, if that waits for what is said.
    """

    def __init__(self, line: Line | None) -> None:
        self._line = line
        self._workers = _Workers()
        self._has_opened = False
        _patch.subscribe(self)

    def born(self, sock: socket.socket, descriptor: object, /) -> None:  # noqa: ARG002
        _patch.unsubscribe_soon(self)
        if not self._has_opened:
            self._has_opened = True
            self._workers.note(_OPENED)
            if self._line is not None:
                # If that cannot be said, nor can the verdict; then that is told.
                with suppress(OSError):
                    self._line.say("opened")

    def detached(self, sock: socket.socket, fd: int, /) -> None:
        """Nothing to be told of."""

    def got_file(self, sock: socket.socket, /) -> None:
        """Nothing to be told of."""

    def dying(self, sock: socket.socket, fd: int, /) -> None:
        """Nothing to be told of."""

    def exhausted(self) -> None:
        """Nothing to be told of."""

    def failed(self) -> None:
        """Nothing to be told of: the launcher will miss the verdict."""

    def end(self, verdict: str) -> None:
        """Say how this process ends."""
        self._workers.note(_ENDED)
        if self._line is not None:
            try:
                self._line.say(verdict)
            except OSError as error:
                if verdict == "clean" and not self._has_opened:
                    # It may have begun when the program had ended. It had nothing to leak.
                    return
                why = f"cannot tell `closewait-guard run` whether it has leaked: {error}"
                print_error(f"process {os.getpid()} {why}")

    def lost_workers(self) -> int:
        """How many forked processes have opened sockets, and ended without saying how."""
        return self._workers.lost()

    def after_fork(self) -> None:
        """In the child."""
        self._has_opened = False
        _patch.subscribe(self)
        if self._line is not None:
            self._line.after_fork()


_OPENED, _ENDED = 1, 2
_ENTRY = struct.Struct("=II")
_MOST_WORKERS = 4096


class _Workers:
    """Memory that forked processes share: it needs no descriptor, and cannot be closed."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _MOST_WORKERS * _ENTRY.size)

    def note(self, state: int) -> None:
        pid = os.getpid()
        _ENTRY.pack_into(self._memory, pid % _MOST_WORKERS * _ENTRY.size, pid, state)

    def lost(self) -> int:
        entries = _ENTRY.iter_unpack(self._memory[:])
        opened = [pid for pid, state in entries if state == _OPENED and pid != os.getpid()]
        return sum(not _is_alive(pid) for pid in opened)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        # One with the rights of another user is alive too.
        return not isinstance(error, ProcessLookupError)
    return True
