"""The line by which each process of the program sends its last report to the launcher.

A line is a connected UNIX socket, and no object of the socket class. The program itself inherits
its line from the launcher. Every other process connects to the launcher, also where it has another
user, another root directory, or none of the descriptors of its parent. Nothing here blocks
for long.
"""

from __future__ import annotations

import _socket
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from time import monotonic, sleep
from typing import NamedTuple, Self

from closewait_guard import _descriptors
from closewait_guard._capture import patch
from closewait_guard._descriptors import Identity, OwnedDescriptor, identity_of
from closewait_guard._render import to_dict
from closewait_guard._stream import print_error
from closewait_guard.model import Report
from closewait_guard.reporters.json_lines import with_examples

__all__ = [
    "MAX_REPORT",
    "Channel",
    "Line",
    "Status",
    "as_text",
    "move_up",
]


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_REPORT = 2_000_000
# The launcher reads all the time, unless it has been stopped.
_MAX_SECONDS = 1.0
# For it to wait for other processes too, and to print the report.
_MAX_SECONDS_TO_PRINT = 3.0
# What the kernel takes at once, so that other processes that share a line cannot come between.
_PIECE = 16_384
_message_numbers = count()

# Out of the way of the numbers that programs count on.
_LOWEST_NUMBER = 64


class Channel(NamedTuple):
    """How to reach the launcher.

    Attributes:
        address: Where it listens; on Linux no file, but a name of the network namespace.
        token: What proves that a process belongs to the program.
        fd: The line that the program inherits, where it still is that.
        identity: What distinguishes that line from what else may have its number.
        is_launcher_beside: It is no parent of the program: so that its report comes before the
            program's end, the program waits for it.
    """

    address: str
    token: str
    fd: int
    identity: Identity
    is_launcher_beside: bool = False

    @classmethod
    def of(cls, address: str, token: str, fd: int, identity: Sequence[int], beside: bool) -> Self:
        """As it is after a way through JSON."""
        return cls(address, token, fd, (identity[0], identity[1], identity[2]), beside)


class Line:
    """One process's line. A forked child gets one of its own.

    Args:
        channel: How to reach the launcher.
        is_main: This process is the program, not a child of it.
    """

    def __init__(self, channel: Channel, *, is_main: bool) -> None:
        self._channel = channel
        self._is_main = is_main
        self._socket: OwnedDescriptor | None = None
        if identity_of(channel.fd) == channel.identity:
            os.set_inheritable(channel.fd, False)  # noqa: FBT003
            self._take(channel.fd)
        if not is_main:
            self._renew()
        self._say_here("main" if is_main else "here")

    def say(self, what: str) -> None:
        """Say something to the launcher.

        Raises:
            OSError: It cannot be reached.
        """
        self._send(f"{self._channel.token} {os.getpid()} {what}\n")

    def send_report(self, text: str) -> None:
        """Send a report, which holds for this process until the next.

        Raises:
            OSError: It cannot be reached.
        """
        number = next(_message_numbers)
        pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
        for place, piece in enumerate(pieces, 1):
            self.say(f"report {number} {place == len(pieces):d} {piece}")

    def wait_for_launcher(self) -> None:
        """Wait until it has printed what was sent, if it is none that waits for this process."""
        if not self._channel.is_launcher_beside or not self._is_main:
            return
        line = _socket.socket(fileno=self._fileno())
        try:
            line.settimeout(_MAX_SECONDS_TO_PRINT)
            # It never sends anything, and closes the line in the end.
            line.recv(1)
        finally:
            line.detach()

    def _send(self, text: str) -> None:
        rest = text.encode(errors="backslashreplace")
        line = _socket.socket(fileno=self._fileno())
        end = monotonic() + _MAX_SECONDS
        try:
            while rest:
                try:
                    rest = rest[line.send(rest, _FLAGS) :]
                except BlockingIOError:
                    if monotonic() > end:
                        raise
                    sleep(0.005)
        finally:
            line.detach()

    def after_fork(self) -> None:
        """In the child: what it shares with its parent would hide the parent's end."""
        self._is_main = False
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


def as_text(report: Report) -> str:
    """As JSON in one line, with fewer examples of each site the longer it is."""
    for examples in (1000, 50, 5, 1):
        report = with_examples(report, examples)
        text = json.dumps(to_dict(report), separators=(",", ":"))
        if len(text) <= MAX_REPORT:
            break
    return text


class Status:
    """Waits for the first socket to be created: what has never opened one has nothing to leak.

    Args:
        line: The line to the launcher, if that waits for what is said.

    Attributes:
        has_opened: Whether this process has opened a socket, in a forked child since the fork.
        has_ended: Whether it has been said how this process ends.
    """

    def __init__(self, line: Line | None) -> None:
        self._line = line
        self.has_opened = self.has_ended = False
        patch.subscribe(self)

    def on_create(self, sock: socket.socket, descriptor: object, /) -> None:  # noqa: ARG002
        patch.try_unsubscribe(self)
        if not self.has_opened:
            self.has_opened = True
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

    def send_state(self, report: str) -> None:
        """Send a report that is not the last, unless that has been sent."""
        if self._line is not None and not self.has_ended:
            with suppress(OSError):
                self._line.send_report(report)

    def end(self, verdict: str, report: str = "", *, is_exec: bool = False) -> bool:
        """Say how this program ends; whether the launcher has got the report, and prints it.

        Args:
            verdict: Whether it has leaked.
            report: Its last report.
            is_exec: Another program takes its place in this process.
        """
        self.has_ended = True
        if self._line is None:
            return False
        try:
            if report:
                self._line.send_report(report)
            self._line.say(f"replaced {verdict}" if is_exec else verdict)
        except OSError as error:
            # It may have begun when the program had ended. Then it had nothing to leak.
            if verdict != "clean" or self.has_opened:
                why = f"cannot report to `closewait-guard run` whether it has leaked: {error}"
                print_error(f"process {os.getpid()} {why}")
            return False
        if not is_exec:
            with suppress(OSError):
                self._line.wait_for_launcher()
        return True

    def resume(self) -> None:
        """Say that the end has failed, and this program goes on."""
        if self.has_ended:
            self.has_ended = False
            if self._line is not None:
                with suppress(OSError):
                    self._line.say("resumed")

    def after_fork(self) -> None:
        """In the child."""
        self.has_opened = self.has_ended = False
        patch.subscribe(self)
        if self._line is not None:
            self._line.after_fork()
