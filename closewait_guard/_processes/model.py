"""Values: processes, their sockets, lines of the kernel's table, and what a scan found."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from closewait_guard._inspect import Endpoint, ProbeResult, has_sent
from closewait_guard.model import Descriptors, Finding, Observation, Report

__all__ = [
    "CLOSE_WAIT",
    "ESTABLISHED",
    "KEEPALIVE",
    "LISTEN",
    "Backend",
    "ChildrensCopies",
    "Descriptor",
    "Entry",
    "Inaccessible",
    "Process",
    "ProcessReport",
    "ProcessScan",
    "ProcessSnapshot",
    "Row",
    "SharedBy",
    "Snapshot",
    "UnownedSocket",
    "UnusedCopy",
    "program_of",
]


class Process(NamedTuple):
    """A process, and what it has open.

    Attributes:
        program: Its name, and a Python program's script or module; no arguments.
        python: The version of its interpreter as far as it shows; empty for other programs.
        sockets: Inode by descriptor; 0 where the platform has none.
        started: Distinguishes it from the next process that gets its number; 0 where that is known
            otherwise.
        descriptors: What all its descriptors are; None where the platform does not say.
    """

    pid: int
    program: str
    python: str
    parent: int
    fd_used: int | None
    fd_limit: int | None
    sockets: Mapping[int, int]
    started: int = 0
    descriptors: Descriptors | None = None

    @property
    def owned(self) -> Set[int]:
        """The inodes of its sockets."""
        return set(self.sockets.values())


_MAX_NAME = 60


def program_of(command: Sequence[str]) -> str:
    """The program in a command line, without arguments, which may hold secrets.

    Example:
        >>> program_of(["/usr/bin/python3", "-u", "app.py", "--password=x"])
        'python3 app.py'
        >>> program_of(["/usr/bin/python3", "-m", "gunicorn", "app:app"])
        'python3 -m gunicorn'
        >>> program_of(["nginx: worker process"]), program_of(["/usr/sbin/nginx", "-g", "x"])
        ('nginx: worker process', 'nginx')
    """
    if not command or not command[0]:
        return ""
    if len(command) == 1 and " " in command[0]:
        # The program has renamed itself.
        return command[0].strip()[:_MAX_NAME]
    name = _file_name(command[0])
    if not name.startswith("python"):
        return name[:_MAX_NAME]
    return " ".join([name, *_script(command[1:])])[:_MAX_NAME]


def _file_name(path: str) -> str:
    return os.path.basename(path.rstrip("/"))


def _script(arguments: Sequence[str]) -> list[str]:
    """A Python program's own name: the module, or the script's file."""
    takes_value = False
    for place, argument in enumerate(arguments):
        if argument == "-m":
            return [argument, *arguments[place + 1 : place + 2]]
        if argument == "-c":
            return [argument]
        if not argument.startswith("-") and not takes_value:
            return [_file_name(argument)]
        takes_value = argument in ("-W", "-X")
    return []


class Descriptor(NamedTuple):
    """A descriptor that is a socket.

    Attributes:
        accepted: Its address is that of a listener, so that it must have come from one.
    """

    fd: int
    endpoint: Endpoint
    view: ProbeResult
    accepted: bool


class SharedBy(NamedTuple):
    """The same socket, elsewhere."""

    pid: int
    program: str
    fd: int


class UnusedCopy(NamedTuple):
    """A connection from before the fork that the parent has closed, without a byte since.

    Attributes:
        seconds: For how long: since the fork.
        may_be_used: The process may be about to use it, for all that shows from outside.
    """

    descriptor: Descriptor
    seconds: float
    may_be_used: bool


class ProcessSnapshot(NamedTuple):
    """One process.

    Attributes:
        states: How many sockets are in each TCP state; other sockets by their protocol.
        ended: The TCP sockets whose connection is no more.
        others: The rest, where they were asked for.
        shared_by: By inode, all who have the same socket open, where that is more than one.
        backlog: Connections that the peer has closed before they were accepted, by address.
        uncertain_backlog: The same, where another process listens at that address, too.
        dated: The kernel said when the peers have closed.
        copies: Connections that it keeps open without using them.
    """

    process: Process
    states: Mapping[str, int]
    ended: Sequence[Descriptor]
    others: Sequence[Descriptor]
    shared_by: Mapping[int, Sequence[SharedBy]]
    backlog: Mapping[str, int]
    uncertain_backlog: Mapping[str, int]
    dated: bool
    copies: Sequence[UnusedCopy] = ()


class UnownedSocket(NamedTuple):
    """A socket in CLOSE_WAIT whose process may not be seen."""

    uid: int
    descriptor: Descriptor


class Inaccessible(NamedTuple):
    """A process that may not be looked into, or is none.

    Attributes:
        why: What keeps it from being looked into, if that is not a lack of rights.
        is_a_loss: It may have sockets that are not reported.
    """

    pid: int
    program: str
    uid: int | None
    exists: bool
    why: str = ""
    is_a_loss: bool = True


class Snapshot(NamedTuple):
    """All that one scan showed.

    Attributes:
        at: The monotonic time when the kernel said how long ago everything was.
        hides_processes: There may be processes of other users that the platform does not list.
    """

    at: float
    snapshots: Sequence[ProcessSnapshot]
    inaccessible: Sequence[Inaccessible]
    unowned: Sequence[UnownedSocket]
    hides_processes: bool = False


class ProcessReport(NamedTuple):
    """One process: its report, and what a report has no room for.

    Attributes:
        parent: The process that has started it.
        states: How many sockets are in each TCP state; other sockets by their protocol.
        backlog: Connections that the peer has closed before they were accepted, by address.
        uncertain_backlog: The same, where another process listens at that address, too.
        narrowed: The report has been cut down to some states.
    """

    report: Report
    parent: int
    states: Mapping[str, int]
    backlog: Mapping[str, int]
    uncertain_backlog: Mapping[str, int]
    narrowed: bool = False

    def in_states(self, states: Set[str]) -> ProcessReport:
        """The same, of the sockets in some states."""
        leaks = tuple(leak for leak in self.report.findings if leak.observation.state in states)
        others = tuple(seen for seen in self.report.observations if seen.state in states)
        report = replace(self.report, findings=leaks, observations=others)
        return self._replace(report=report, narrowed=True)


class ProcessScan(NamedTuple):
    """What one scan found.

    Attributes:
        inaccessible: Processes that are none, or may not be looked into.
        unowned: By user, sockets in CLOSE_WAIT whose process may not be seen.
        has_undated: There are connections whose end has no date, or a bound that is within the
            grace time: a second scan shows whether that has passed.
        hides_processes: There may be processes of other users that the platform does not list.
    """

    processes: tuple[ProcessReport, ...]
    inaccessible: Sequence[Inaccessible]
    unowned: Mapping[int, Sequence[Observation]]
    has_undated: bool
    hides_processes: bool = False


class ChildrensCopies(NamedTuple):
    """What child processes keep open of what this process has closed.

    Attributes:
        leaks: By inode, those that a child keeps open without using them.
        gone: The inodes that no child has any more.
        notes: What could not be seen.
        unread: The children of which that is so.
        undecided: By inode, those that a child may use, for all that shows; but what was accepted,
            which a server's children serve.
    """

    leaks: dict[int, Finding]
    gone: frozenset[int]
    notes: tuple[str, ...]
    unread: tuple[int, ...] = ()
    undecided: dict[int, Finding] = {}  # noqa: RUF012 - it is never changed


class Backend(Protocol):
    """One platform's way to look at processes."""

    def take_snapshot(self, pids: Sequence[int] | None, /, *, everything: bool) -> Snapshot:
        """Scan some processes, or all.

        Args:
            pids: Their numbers; None for all that there are.
            everything: Describe the healthy sockets too.
        """

    def descendants(self, pids: Sequence[int], /) -> list[int]:
        """The processes, with all those that they have started, and so on."""


ESTABLISHED, CLOSE_WAIT, LISTEN = 1, 8, 10

# The kernel's number of the timer that runs until the next keepalive probe.
KEEPALIVE = 2


# The same as an Entry: of the many that are only counted, none is made.
Row = tuple[Any, ...]


class Entry(NamedTuple):
    """Numbers, ports and addresses in the order of the wire.

    Attributes:
        timer: Which is running; `KEEPALIVE` or another.
        inode: 0 while no program has the socket: it waits to be accepted, or was closed.
        info: `struct tcp_info`, where it was asked for and given.
    """

    family: int
    state: int
    timer: int
    local_port: bytes
    peer_port: bytes
    local_host: bytes
    peer_host: bytes
    received: int
    sent: int
    uid: int
    inode: int
    info: bytes | None = None

    @property
    def local(self) -> str:
        """The address of this end."""
        return f"{_host(self.family, self.local_host)}:{int.from_bytes(self.local_port)}"

    @property
    def peer(self) -> str | None:
        """The address of the other end; None while there is none."""
        if self.state == LISTEN:
            return None
        return f"{_host(self.family, self.peer_host)}:{int.from_bytes(self.peer_port)}"

    @property
    def family_name(self) -> str:
        """As Python names it."""
        return "AF_INET6" if self.family == socket.AF_INET6 else "AF_INET"

    @property
    def unread(self) -> int:
        """Bytes that wait to be read: the kernel counts the FIN as one."""
        if self.state == LISTEN:
            return 0
        return self.received - (self.state == CLOSE_WAIT and self.received > 0)

    @property
    def has_sent(self) -> bool:
        """Whether this end is known to have sent anything."""
        return has_sent(self.info or b"")

    @property
    def unsent(self) -> int:
        """Bytes that the peer has not acknowledged."""
        return 0 if self.state == LISTEN else self.sent


@lru_cache(4096)
def _host(family: int, raw: bytes) -> str:
    if family == socket.AF_INET6:
        return f"[{socket.inet_ntop(socket.AF_INET6, raw)}]"
    return socket.inet_ntop(socket.AF_INET, raw[:4])
