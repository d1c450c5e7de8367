"""What the launcher and the processes of the program have in common.

The launcher hands its configuration over in the environment. Each process sends its last report by
a line.

A line is a connected UNIX socket, and no object of the socket class. The program itself inherits
its line from the launcher. Every other process connects to the launcher, also where it has another
user, another root directory, or none of the descriptors of its parent. Nothing here blocks
for long.
"""

from __future__ import annotations

import _socket
import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from time import monotonic, sleep
from typing import NamedTuple, Self

from closewait_guard import _descriptors
from closewait_guard._descriptors import Identity, OwnedDescriptor, identity_of

__all__ = [
    "FOLDER",
    "MAX_REPORT",
    "Channel",
    "ChildConfig",
    "Line",
    "SentReports",
    "move_up",
    "prints_json",
]


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_REPORT = 2_000_000
_MAX_BYTES_OF_REPORTS = 64_000_000
# The launcher reads all the time, unless it has been stopped.
_MAX_SECONDS = 1.0
# For it to wait for other processes too, and to print the report.
_MAX_SECONDS_TO_PRINT = 3.0
# What the kernel takes at once, so that other processes that share a line cannot come between.
_PIECE = 16_384
_message_numbers = count()

# Out of the way of the numbers that programs count on.
_LOWEST_NUMBER = 64


_STDERR = (":/dev/stderr", ":/dev/fd/2", ":/proc/self/fd/2")


def prints_json(reporters: Iterable[str]) -> bool:
    """Whether a reporter writes JSON to stderr: then no report is printed there as text."""
    return any("json_lines:" in name and name.endswith(_STDERR) for name in reporters)


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
        is_helper: It only starts or counts processes for the program, and ends after it.
    """

    def __init__(self, channel: Channel, *, is_main: bool, is_helper: bool = False) -> None:
        self._channel = channel
        self._is_main = is_main
        self._socket: OwnedDescriptor | None = None
        if identity_of(channel.fd) == channel.identity:
            os.set_inheritable(channel.fd, False)  # noqa: FBT003
            self._take(channel.fd)
        if not is_main:
            self._renew()
        self._say_here("main" if is_main else "helper" if is_helper else "here")

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


class _SentReport(NamedTuple):
    """The last report of a program that a process has run, as text."""

    pid: int
    text: str
    is_last: bool
    is_before_exec: bool


class SentReports:
    """In the launcher: of each program that a process has run, the newest report."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, str], list[str]] = {}
        self._whole: dict[int, str] = {}
        self._before_exec: set[int] = set()
        self._kept: list[_SentReport] = []
        self._size = 0
        self._too_large: set[int] = set()

    def add_piece(self, pid: int, what: str) -> None:
        """Add a part of a report: its number, whether it is the last part, and the text."""
        number, _, rest = what.partition(" ")
        is_last, _, text = rest.partition(" ")
        pieces = self._pieces.setdefault((pid, number), [])
        pieces.append(text)
        self._size += len(text)
        if is_last == "1":
            whole = "".join(self._pieces.pop((pid, number)))
            self._size -= len(self._whole.pop(pid, ""))
            self._whole[pid] = whole
            self._before_exec.discard(pid)
        if self._size > _MAX_BYTES_OF_REPORTS or sum(map(len, pieces)) > MAX_REPORT:
            self._size -= sum(map(len, self._pieces.pop((pid, number), ())))
            self._size -= len(self._whole.pop(pid, ""))
            self._too_large.add(pid)

    def note_exec(self, pid: int) -> None:
        """The report of the process is that of a program that another is about to replace."""
        self._before_exec.add(pid)

    def keep(self, pid: int, *, is_last: bool) -> None:
        """The next report of the process will be that of another program."""
        if pid in self._whole:
            is_before_exec = pid in self._before_exec
            text = self._whole.pop(pid)
            self._kept.append(_SentReport(pid, text, is_last or is_before_exec, is_before_exec))

    def take(self, ended: Container[int]) -> list[_SentReport]:
        """All since the last call, each the last one of its program if the process has ended."""
        for pid in list(self._whole):
            self.keep(pid, is_last=pid in ended)
        kept, self._kept = self._kept, []
        return kept

    def take_too_large(self) -> set[int]:
        """The processes whose reports are left out, because they are too large."""
        found, self._too_large = self._too_large, set()
        return found


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


# With an underscore before it: the settings refuse names that they do not know.
_VARIABLE = "_CLOSEWAIT_GUARD_RUN"
_MAIN = "_CLOSEWAIT_GUARD_MAIN"
# On PYTHONPATH, with what Python imports as it starts.
FOLDER = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib is slow


class ChildConfig(NamedTuple):
    """What settings have no name for.

    Attributes:
        reporters: What gets the report at every interval, by name.
        channel: Where the launcher hears how a process ends; None if it does not wait for that.
        attribute: What opens native sockets.
        has_metrics: The launcher asks for numbers, so that reports are made at intervals.
    """

    reporters: tuple[str, ...]
    channel: Channel | None = None
    attribute: tuple[str, ...] = ()
    has_metrics: bool = False

    def environment(
        self, settings: Mapping[str, str], environ: Mapping[str, str]
    ) -> dict[str, str]:
        """The environment in which a program and its Python children are guarded."""
        paths = [FOLDER]
        # An empty path would stand for the directory that the program is started in.
        paths += [path for path in (environ.get("PYTHONPATH"),) if path]
        return {
            **environ,
            **settings,
            "PYTHONPATH": os.pathsep.join(paths),
            _VARIABLE: json.dumps(self),
        }

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """What the launcher has handed over."""
        reporters, channel, attribute, has_metrics = json.loads(environ[_VARIABLE])
        channel = None if channel is None else Channel.of(*channel)
        return cls(tuple(reporters), channel, tuple(attribute), has_metrics)

    @staticmethod
    def mark_main(environ: dict[str, str], pid: int) -> dict[str, str]:
        """The environment of the process that is the program, not a child of it."""
        return environ | {_MAIN: str(pid)}

    @staticmethod
    def is_main(environ: Mapping[str, str], pid: int) -> bool:
        """Whether this process is the program itself, not a child of it."""
        return environ.get(_MAIN) == str(pid)
