"""Linux: processes, their descriptors and the tables of sockets as text, from /proc.

The table of TCP dates nothing, and costs the kernel more than netlink; it is what remains where the
namespace of another process may not be entered, or the kernel answers no diagnostics.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from functools import cached_property
from typing import NamedTuple, TextIO

from closewait_guard._descriptors import sockets_of_process
from closewait_guard._inspect import Endpoint, ProbeResult, descriptors_of_process
from closewait_guard._processes.model import Descriptor, Entry, Process, program_of
from closewait_guard.model import Connection, Evidence, State

__all__ = [
    "HasNoDescriptorsError",
    "SocketsWithoutRow",
    "age_of",
    "all_pids",
    "are_hidden",
    "has_ended",
    "has_stayed",
    "is_hidden",
    "local_addresses",
    "namespace_of",
    "parents",
    "present_in",
    "protocol_of",
    "read",
    "seconds_since_boot",
    "some_sockets_of",
    "table",
    "user_of",
]


_PYTHON = re.compile(r"python(\d+\.\d+)")
# Where a program's name ends is a matter of its first words, and its arguments have no bound.
_MAX_COMMAND = 4096
_KERNEL_THREAD = 0x00200000


class HasNoDescriptorsError(Exception):
    """There is such a process, and nothing to look at. The text says why, as a predicate."""


def all_pids() -> list[int]:
    """Of all processes that this one can see."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def are_hidden() -> bool:
    """Whether /proc may leave out the processes of other users, and shows none of them."""
    try:
        mounts = _text_of("/proc/self/mountinfo")
    except OSError:
        return False
    here = [line for line in mounts.splitlines() if line.split(" ")[4:5] == ["/proc"]]
    return any(map(_HIDES.search, here)) and _all_are_ours()


# In numbers up to Linux 5.7, in words since.
_HIDES = re.compile(r"[ ,]hidepid=(?:2|4|invisible|ptraceable)\b")


def _all_are_ours() -> bool:
    own = os.geteuid()
    for pid in all_pids():
        with suppress(OSError):
            if user_of(pid) != own:
                return False
    return True


def is_hidden(pid: int) -> bool:
    """Whether there is such a process, and /proc shows no sign of it."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not os.path.exists(f"/proc/{pid}")
    except OSError:
        return False
    return False


def _text_of(path: str) -> str:
    with open(path, encoding="utf-8", errors="backslashreplace") as file:
        return file.read()


class _Status(NamedTuple):
    """What matters here of /proc/PID/stat.

    Attributes:
        state: A letter.
        started: When, since the machine was.
    """

    state: str
    parent: int
    flags: int
    threads: int
    started: int


def _status(pid: int) -> _Status:
    # The program's name stands in brackets before the rest, and may hold anything.
    words = _text_of(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return _Status(words[0], int(words[1]), int(words[6]), int(words[17]), int(words[19]))


def read(pid: int) -> Process:
    """A process with its sockets.

    Raises:
        ProcessLookupError: There is none of this number.
        HasNoDescriptorsError: It is one that has none.
        PermissionError: Its descriptors may not be looked at.
    """
    try:
        status = _status(pid)
        _require_descriptors(status)
        sockets, descriptors = descriptors_of_process(pid)
        process = Process(
            pid=pid,
            program=program(pid),
            python=_python(pid),
            parent=status.parent,
            fd_used=descriptors.total,
            fd_limit=_fd_limit(pid),
            sockets=sockets,
            started=status.started,
            descriptors=descriptors,
        )
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    if not has_stayed(process):
        raise ProcessLookupError(pid)
    return process


def _require_descriptors(status: _Status) -> None:
    if status.flags & _KERNEL_THREAD:
        raise HasNoDescriptorsError("is a kernel thread, and has no descriptors")
    if status.state in "ZX" and status.threads > 1:
        raise HasNoDescriptorsError(
            "continues without its main thread, so that /proc shows nothing"
        )
    if status.state in "ZX":
        raise HasNoDescriptorsError("has ended, and its parent has not waited for it")


def has_ended(pid: int) -> bool:
    """Whether a process is no more, or is only waited for: then it has no descriptors."""
    try:
        status = _status(pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return status.state in "ZX" and status.threads <= 1


def has_stayed(process: Process) -> bool:
    """Whether it has not ended, with perhaps another in its place that has its number."""
    try:
        return _status(process.pid).started == process.started
    except OSError:
        return False


def seconds_since_boot() -> float:
    """The present, by the clock that dates the start of processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def age_of(process: Process, at: float) -> float:
    """Seconds from its start, or the fork, which the kernel counts in ticks, to a moment."""
    return at - process.started / os.sysconf("SC_CLK_TCK")


def some_sockets_of(
    pids: Iterable[int], likely: frozenset[int]
) -> Iterator[tuple[int, Mapping[int, int]]]:
    """Of those processes that may be looked into."""
    for pid in pids:
        with suppress(OSError):
            yield pid, sockets_of_process(pid, likely)[1]


def present_in(pids: Iterable[int], fds: Mapping[int, int]) -> tuple[set[int], list[int]]:
    """Which sockets any of the processes has, and which processes may not be looked into.

    Args:
        pids: The processes.
        fds: By inode, the number that each has where it is present.
    """
    present, unread, likely = set[int](), list[int](), frozenset(fds.values())
    for pid in pids:
        try:
            sockets = sockets_of_process(pid, likely)[1]
        except OSError:
            unread += [] if has_ended(pid) else [pid]
            continue
        present |= {inode for fd, inode in sockets.items() if fds.get(inode) == fd}
    return present, unread


def protocol_of(pid: int, fd: int, inode: int) -> str | None:
    """`TCP`, `UDPv6`, `UNIX-STREAM`...; None where a descriptor is not this socket any more."""
    path = f"/proc/{pid}/fd/{fd}"
    try:
        name = os.getxattr(path, "system.sockprotoname")
        if os.readlink(path) != f"socket:[{inode}]":
            return None
    except OSError:
        return None
    return name.rstrip(b"\0").decode("ascii", "replace")


def program(pid: int) -> str:
    """What the process is called: without its arguments, which may hold secrets."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        words = file.read(_MAX_COMMAND).rstrip(b"\0").split(b"\0")
    name = program_of([word.decode(errors="backslashreplace") for word in words])
    return name or _text_of(f"/proc/{pid}/comm").strip()


def _python(pid: int) -> str:
    """The version of the interpreter by its file's name; empty for other programs."""
    try:
        found = _PYTHON.search(os.path.basename(os.readlink(f"/proc/{pid}/exe")))
    except OSError:
        return ""
    return found[1] if found else ""


def _fd_limit(pid: int) -> int | None:
    for line in _text_of(f"/proc/{pid}/limits").splitlines():
        if line.startswith("Max open files"):
            with suppress(ValueError, IndexError):
                return int(line.split()[3])
    return None


def parents() -> Iterator[tuple[int, int]]:
    """Each process and its parent."""
    for pid in all_pids():
        with suppress(OSError):
            yield pid, _status(pid).parent


def user_of(pid: int) -> int:
    """The number of the user that the process runs as."""
    return os.stat(f"/proc/{pid}").st_uid


def namespace_of(pid: int | str) -> int | None:
    """What identifies a network; None where it may not be read."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None


def table(pid: int | str) -> Iterator[Entry]:
    """Every TCP connection of the network that a process lives in."""
    for family, line in _lines(pid, {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6}):
        # What is no line of a table is passed over, so that it hides no other.
        with suppress(ValueError, IndexError, struct.error):
            yield _entry(family, line.split())


def _entry(family: int, words: list[str]) -> Entry:
    local_host, local_port = _address(words[1], family)
    peer_host, peer_port = _address(words[2], family)
    sent, received = (int(queue, 16) for queue in words[4].split(":"))
    return Entry(
        family,
        int(words[3], 16),
        int(words[5].partition(":")[0], 16),
        local_port,
        peer_port,
        local_host,
        peer_host,
        received,
        sent,
        int(words[7]),
        int(words[9]),
    )


def _address(text: str, family: int) -> tuple[bytes, bytes]:
    """Words of 32 bits in the machine's own order; the port as a number."""
    host, port = text.split(":")
    if (len(host), len(port)) != (32 if family == socket.AF_INET6 else 8, 4):
        raise ValueError(text)
    words = (host[start : start + 8] for start in range(0, len(host), 8))
    return b"".join(struct.pack("=I", int(word, 16)) for word in words), bytes.fromhex(port)


def local_addresses(pid: int) -> dict[int, tuple[str | None, str | None]]:
    """Of UDP and UNIX sockets in a process's network, by inode: this end and the other."""
    found: dict[int, tuple[str | None, str | None]] = {}
    for family, line in _lines(pid, {"udp": socket.AF_INET, "udp6": socket.AF_INET6}):
        with suppress(ValueError, IndexError, struct.error):
            entry = _entry(family, line.split())
            connected = entry.peer if any(entry.peer_port) else None
            found[entry.inode] = entry.local, connected
    return found | _unix_addresses(pid)


# Number, references, protocol, flags, type, state, inode, and the path if it has one.
_UNIX = re.compile(r"[0-9a-fA-F]+: (?:[0-9A-F]+ ){5} *([0-9]{1,20})(?: (.*))?\n?")


def _unix_addresses(pid: int) -> dict[int, tuple[str | None, str | None]]:
    """A path may hold the end of a line, and what looks like another: then neither is believed."""
    found: dict[int, tuple[str | None, str | None]] = {}
    for _, line in _lines(pid, {"unix": socket.AF_UNIX}):
        match = _UNIX.fullmatch(line)
        if match is not None:
            inode = int(match[1])
            found[inode] = (None if inode in found else match[2]), None
    return found


def _lines(pid: int | str, files: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    for name, family in files.items():
        # There need not be IPv6. Where the others are missing, the process has ended.
        absent = suppress(FileNotFoundError) if name.endswith("6") else nullcontext()
        with absent, _open_table(pid, name) as lines:
            next(lines, None)
            for line in lines:
                yield family, line


def _open_table(pid: int | str, name: str) -> TextIO:
    path = f"/proc/{pid}/net/{name}"
    return open(path, encoding="utf-8", errors="backslashreplace", newline="\n")


_TCP = {"TCP": "AF_INET", "TCPv6": "AF_INET6", "MPTCP": "AF_INET", "MPTCPv6": "AF_INET6"}
_KINDS = {
    "UDP": ("AF_INET", "SOCK_DGRAM"),
    "UDPv6": ("AF_INET6", "SOCK_DGRAM"),
    "RAW": ("AF_INET", "SOCK_RAW"),
    "RAWv6": ("AF_INET6", "SOCK_RAW"),
    "UNIX": ("AF_UNIX", "SOCK_DGRAM"),
    "UNIX-STREAM": ("AF_UNIX", "SOCK_STREAM"),
}

# Never connected, refused, or reset: the kernel does not say which, nor since when.
_CLOSED = ProbeResult(State.CLOSE, Evidence.TABLE, Connection.UNCONNECTED)


class SocketsWithoutRow:
    """What is known of the sockets of one process that no table of connections has."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def protocol(self, fd: int, inode: int) -> str | None:
        """The protocol as the kernel names it; None if the descriptor was closed meanwhile."""
        return protocol_of(self._process.pid, fd, inode)

    def unconnected(self, fd: int, inode: int, protocol: str) -> Descriptor | None:
        """A TCP socket without a connection; None for one of another protocol."""
        family = _TCP.get(protocol)
        if family is None:
            return None
        endpoint = Endpoint(family, "SOCK_STREAM", None, None, inode)
        return Descriptor(fd, endpoint, _CLOSED, accepted=False)

    def describe(self, fd: int, inode: int, protocol: str) -> Descriptor:
        """A socket of another protocol, with its addresses as far as there are any."""
        family, kind = _KINDS.get(protocol, (f"AF_{protocol}", "SOCK_RAW"))
        state = State.UNIX if family == "AF_UNIX" else State.NONE
        view = ProbeResult(state, Evidence.TABLE, Connection.NOT_APPLICABLE)
        local, peer = self._addresses.get(inode, (None, None))
        return Descriptor(fd, Endpoint(family, kind, local, peer, inode), view, accepted=False)

    @cached_property
    def _addresses(self) -> dict[int, tuple[str | None, str | None]]:
        try:
            return local_addresses(self._process.pid)
        except OSError:
            # It has ended meanwhile.
            return {}
