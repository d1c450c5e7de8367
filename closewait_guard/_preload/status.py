"""The line by which each process of the program says to the launcher how it ends.

A line is a connected UNIX socket, and no object of the socket class. The program itself inherits
its line from the launcher. Every other process connects to the launcher, also where it has another
user, another root directory, or none of the descriptors of its parent. Nothing here ever blocks.

Forked processes also note in shared memory whether they have opened sockets and have ended.
"""

from __future__ import annotations

import _socket
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Self

from closewait_guard import _descriptors
from closewait_guard._capture import patch
from closewait_guard._descriptors import Identity, OwnedDescriptor, identity_of
from closewait_guard._stream import print_error

__all__ = [
    "Channel",
    "Line",
    "Status",
    "move_up",
]


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Out of the way of the numbers that programs count on.
_LOWEST_NUMBER = 64


class Channel(NamedTuple):
    """How to reach the launcher.

    Attributes:
        address: Where it listens; on Linux no file, but a name of the network namespace.
        token: What proves that a process belongs to the program.
        fd: The line that the program inherits, where it still is that.
        identity: What distinguishes that line from what else may have its number.
    """

    address: str
    token: str
    fd: int
    identity: Identity

    @classmethod
    def of(cls, address: str, token: str, fd: int, identity: Sequence[int]) -> Self:
        """As it is after a way through JSON."""
        return cls(address, token, fd, (identity[0], identity[1], identity[2]))


class Line:
    """One process's line. A forked child gets one of its own.

    Args:
        channel: How to reach the launcher.
        is_main: This process is the program, not a child of it.
    """

    def __init__(self, channel: Channel, *, is_main: bool) -> None:
        self._channel = channel
        self._socket: OwnedDescriptor | None = None
        if identity_of(channel.fd) == channel.identity:
            os.set_inheritable(channel.fd, False)  # noqa: FBT003
            self._take(channel.fd)
        if not is_main:
            self._renew()
        self._say_here("main" if is_main else "here")

    def say(self, what: str) -> None:
        """Report to the launcher.

        Raises:
            OSError: It cannot be reached.
        """
        text = f"{self._channel.token} {os.getpid()} {what}\n"
        line = _socket.socket(fileno=self._fileno())
        try:
            line.send(text.encode(errors="backslashreplace"), _FLAGS)
        finally:
            line.detach()

    def after_fork(self) -> None:
        """In the child: what it shares with its parent would hide the parent's end."""
        self._renew()
        self._say_here("here")

    def _say_here(self, what: str) -> None:
        # If this cannot be said, nor can the verdict; then that is reported.
        with suppress(OSError):
            self.say(what)

    def _fileno(self) -> int:
        """Its number; a new line where the program has closed the one that was."""
        fd = -1 if self._socket is None else self._socket.fileno()
        return fd if fd >= 0 else self._take(self._connect())

    def _renew(self) -> None:
        """A line of its own; where that cannot be had, the shared one serves."""
        with suppress(OSError):
            self._take(self._connect())

    def _take(self, fd: int) -> int:
        if self._socket is not None:
            self._socket.close()
        self._socket = OwnedDescriptor(fd)
        # No guard must report it as a socket of the program.
        _descriptors.own_socket = identity_of(fd)
        return fd

    def _connect(self) -> int:
        line = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            line.settimeout(0)
            line.connect(self._channel.address)
        except BaseException:
            line.close()
            raise
        return move_up(line.detach())


# The program may have SIGPIPE end it.
_FLAGS = getattr(_socket, "MSG_NOSIGNAL", 0) | getattr(_socket, "MSG_DONTWAIT", 0)


def move_up(fd: int) -> int:
    """The same under a high number, where the limit leaves room for that."""
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LOWEST_NUMBER)
    except OSError:
        return fd
    os.close(fd)
    return high


class Status:
    """Waits for the first socket to be created: what has never opened one has nothing to leak.

    Args:
        line: The line to the launcher, if that waits for what is said.
    """

    def __init__(self, line: Line | None) -> None:
        self._line = line
        self._workers = _Workers()
        self._has_opened = False
        patch.subscribe(self)

    def on_create(self, sock: socket.socket, descriptor: object, /) -> None:  # noqa: ARG002
        patch.try_unsubscribe(self)
        if not self._has_opened:
            self._has_opened = True
            self._workers.note(_OPENED)
            if self._line is not None:
                # If that cannot be said, nor can the verdict; then that is reported.
                with suppress(OSError):
                    self._line.say("opened")

    def on_detach(self, sock: socket.socket, fd: int, /) -> None:
        """Nothing to report."""

    def on_makefile(self, sock: socket.socket, /) -> None:
        """Nothing to report."""

    def on_finalize(self, sock: socket.socket, fd: int, /) -> None:
        """Nothing to report."""

    def on_close_in_collection(self, sock: socket.socket, fd: int, /) -> None:
        """Nothing to report."""

    def on_fd_exhausted(self) -> None:
        """Nothing to report."""

    def on_error(self) -> None:
        """Nothing to report: the launcher will miss the verdict."""

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
                why = f"cannot report to `closewait-guard run` whether it has leaked: {error}"
                print_error(f"process {os.getpid()} {why}")

    def lost_workers(self) -> int:
        """How many forked processes have opened sockets, and ended without saying how."""
        return self._workers.lost()

    def after_fork(self) -> None:
        """In the child."""
        self._has_opened = False
        patch.subscribe(self)
        if self._line is not None:
            self._line.after_fork()


_OPENED, _ENDED = 1, 2
_ENTRY = struct.Struct("=II")
_MAX_WORKERS = 4096


class _Workers:
    """Memory that forked processes share: it needs no descriptor, and cannot be closed."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _MAX_WORKERS * _ENTRY.size)

    def note(self, state: int) -> None:
        pid = os.getpid()
        _ENTRY.pack_into(self._memory, pid % _MAX_WORKERS * _ENTRY.size, pid, state)

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
