"""Linux: the kernel's own list of TCP connections, through socket diagnostics over netlink.

Where that is refused, the table in /proc stands in: it dates nothing.

`ss` asks in the same way. Only of connections that are to be dated is `struct tcp_info` asked for:
the rest costs the kernel, and us, a tenth of the time.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import closing, nullcontext, suppress

from closewait_guard._descriptors import OwnedDescriptor
from closewait_guard._processes import procfs
from closewait_guard._processes.model import CLOSE_WAIT, LISTEN, Entry, Row

__all__ = [
    "Network",
    "answers",
    "dump",
    "network_of",
    "open_socket",
]


_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_DONE, _ERROR = 3, 2
_INET_DIAG_INFO = 2
_CLONE_NEWNET = 0x40000000

# struct nlmsghdr: length, type, flags, sequence, port.
_HEADER = struct.Struct("=IHHII")
# struct inet_diag_req_v2: family, protocol, wanted attributes, padding, states, any address.
_REQUEST = struct.Struct("=BBBxI48x")
# The header, then of struct inet_diag_msg: family, state, timer, ports, addresses, queues, user,
# inode.
_MESSAGE = struct.Struct("=16x BBBx 2s2s 16s16s 12x 4x IIII")
_START = struct.Struct("=IH")
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVED_AT_ONCE = 1 << 20
_SECONDS_FOR_ANSWER = 10.0

# All in which a program can have a socket: not TIME_WAIT, SYN_RECV and NEW_SYN_RECV, which are the
# kernel's own. The closed and unconnected are in no table.
_OPEN = sum(1 << number for number in (1, 2, LISTEN))
_ENDING = sum(1 << number for number in (4, 5, 9, 11))


class Network:
    """Connections by inode.

    Args:
        wanted: The inodes that matter.
        dated: The kernel says when the peers have closed.

    Attributes:
        rows: Of the wanted sockets.
        at: When those that are up were read, by the clock that dates the start of processes.
        others_in_close_wait: In CLOSE_WAIT, and not of the wanted.
    """

    def __init__(self, wanted: Set[int], *, dated: bool) -> None:
        self.rows: dict[int, Row] = {}
        self.at = 0.0
        self.others_in_close_wait: list[Entry] = []
        self.dated = dated
        self._wanted = wanted
        # By family and port.
        self._listeners: dict[tuple[int, bytes], list[Entry]] = {}

    def take(self, rows: Iterable[Row]) -> None:
        """Take in some connections; of one that has been seen before, this is the later state."""
        wanted, found = self._wanted, self.rows
        for row in rows:
            state, inode = row[1], row[10]
            if inode in wanted:
                found[inode] = row
            if state == LISTEN:
                self._listeners.setdefault((row[0], row[3]), []).append(Entry(*row))
            elif state == CLOSE_WAIT and inode not in wanted:
                self.others_in_close_wait.append(Entry(*row))
        self.at = self.at or procfs.seconds_since_boot()

    def is_complete(self) -> bool:
        """Whether each wanted socket has been seen."""
        return len(self.rows) == len(self._wanted)

    def is_accepted(self, entry: Entry) -> bool:
        """Whether a listener has a connection's address, so that it must have come from one."""
        # Of a client's connections, which may be many, none has a port of a listener.
        key = entry.family, entry.local_port
        return key in self._listeners and bool(self._listeners_of(entry))

    def listeners_for(self, entry: Entry) -> set[int]:
        """The inodes of those listeners that a connection may wait at to be accepted.

        The kernel says that of none. Several can have one address: by SO_REUSEPORT, or because
        one listens at all addresses and another at a single one.
        """
        found = self._listeners_of(entry)
        # Of a listener, what it has received is how many connections wait.
        waited_at = [each for each in found if each.received]
        return {each.inode for each in waited_at or found}

    def _listeners_of(self, entry: Entry) -> list[Entry]:
        """What came in by IPv4 at a listener of IPv6 is of that one's family, too."""
        if entry.state == LISTEN:
            return []
        of_port = self._listeners.get((entry.family, entry.local_port), ())
        return [
            each
            for each in of_port
            if each.local_host == entry.local_host or not any(each.local_host)
        ]


def network_of(
    namespace: int | None, pids: Sequence[int | str], wanted: Set[int], *, dated: bool
) -> Network | None:
    """The network of some processes; None where it cannot be looked at.

    Args:
        namespace: What identifies its network.
        pids: The processes in it; any of them may end meanwhile. "self" is this process.
        wanted: The inodes that matter.
        dated: Ask for the times of every connection, not only of those that have ended.
    """
    for pid in pids:
        for ask in (_by_netlink, _by_table):
            with suppress(OSError):
                network = ask(pid, wanted, dated=dated)
                # Another may have its number now, and live elsewhere.
                if procfs.namespace_of(pid) == namespace:
                    return network
    return None


def _by_netlink(pid: int | str, wanted: Set[int], *, dated: bool) -> Network:
    namespace = None if pid == "self" else f"/proc/{pid}/ns/net"
    with closing(open_socket(namespace)) as sock:
        network = Network(wanted, dated=True)
        network.take(dump(sock, _OPEN, dated=dated))
        network.take(dump(sock, 1 << CLOSE_WAIT, dated=True))
        # Most of these are the kernel's own, of sockets that were closed long ago.
        if not network.is_complete():
            network.take(dump(sock, _ENDING, dated=dated))
    return network


def _by_table(pid: int | str, wanted: Set[int], *, dated: bool) -> Network:  # noqa: ARG001
    network = Network(wanted, dated=False)
    network.take(procfs.table(pid))
    return network


def open_socket(namespace: str | None = None) -> _socket.socket:
    """A netlink socket of this process's network, or of the namespace that a path stands for.

    Raises:
        OSError: The namespace may not be entered, or the kernel has no netlink.
    """
    if namespace is not None:
        return _open_within(namespace)
    # Not by the class that a guard in this process, or gevent, has changed.
    sock = _socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
    # The kernel answers at once; whatever stands in its place may not.
    sock.settimeout(_SECONDS_FOR_ANSWER)
    return sock


def answers() -> bool:
    """Whether the kernel answers such questions, for this process."""
    try:
        with closing(open_socket()) as sock:
            list(dump(sock, 0, dated=False))
    except OSError:
        return False
    return True


def _open_within(namespace: str) -> _socket.socket:
    """A thread enters the namespace, and ends there; the socket stays in it."""
    import threading

    found: list[_socket.socket | OSError] = []

    def enter() -> None:
        try:
            _enter(namespace)
            found.append(open_socket())
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]


def _enter(namespace: str) -> None:
    descriptor = OwnedDescriptor(os.open(namespace, os.O_RDONLY))
    try:
        if hasattr(os, "setns"):
            os.setns(descriptor.fileno(), _CLONE_NEWNET)
        else:
            _setns(descriptor.fileno())
    finally:
        descriptor.close()


def _setns(fd: int) -> None:
    """Python 3.11 has no name for it."""
    import ctypes

    setns = getattr(ctypes.CDLL(None, use_errno=True), "setns", None)
    if setns is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def dump(sock: _socket.socket, states: int, *, dated: bool) -> Iterator[Row]:
    """The TCP connections in some states: a bit for each of the kernel's numbers.

    Args:
        sock: What `open_socket` returned.
        states: The states that are asked for.
        dated: With `struct tcp_info`.

    Raises:
        OSError: The kernel does not answer such questions.
    """
    wanted = 1 << (_INET_DIAG_INFO - 1) if dated else 0
    for family in (socket.AF_INET, socket.AF_INET6):
        body = _REQUEST.pack(family, socket.IPPROTO_TCP, wanted, states)
        size = _HEADER.size + len(body)
        sock.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 0, 0) + body)
        # A kernel without IPv6 says that it has no such family.
        with suppress(FileNotFoundError) if family == socket.AF_INET6 else nullcontext():
            yield from _answers(sock, _rows_with_info if dated else _rows_without_info)


def _answers(sock: _socket.socket, rows: Callable[[bytes], Iterable[Row]]) -> Iterator[Row]:
    while True:
        data = sock.recv(_RECEIVED_AT_ONCE)
        try:
            _, kind = _START.unpack_from(data)
            if kind == _DONE:
                return
            if kind == _ERROR:
                (number,) = struct.unpack_from("=i", data, _HEADER.size)
                raise OSError(-number, os.strerror(-number))
            yield from rows(data)
        except struct.error as error:
            raise _malformed() from error


def _malformed() -> OSError:
    return OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))


def _rows_without_info(data: bytes) -> Iterable[Row]:
    """Most often all messages are of one length: then one call of C takes them apart."""
    length = _first_length(data)
    if _is_uniform(data, length):
        return _fields(f"{length - _MESSAGE.size}x").iter_unpack(data)
    return (row for row, _ in _one_by_one(data))


def _rows_with_info(data: bytes) -> Iterable[Row]:
    """The same, with `struct tcp_info` in the same place of each."""
    length = _first_length(data)
    start, end = _attribute(data, _MESSAGE.size, length)
    header = start - _ATTRIBUTE.size
    if start and _is_uniform(data, length) and _is_repeated(data, length, header, start):
        return _fields(f"{start - _MESSAGE.size}x {end - start}s {length - end}x").iter_unpack(data)
    return ((*row, _info(data, *place)) for row, place in _one_by_one(data))


def _fields(rest: str) -> struct.Struct:
    return struct.Struct(f"{_MESSAGE.format} {rest}")


def _first_length(data: bytes) -> int:
    length: int = _START.unpack_from(data)[0]
    if not _MESSAGE.size <= length <= len(data):
        raise _malformed()
    return length


def _is_uniform(data: bytes, length: int) -> bool:
    """Whether all messages are connections, and of one length."""
    if len(data) % length or length % 4:
        return False
    _, kind = _START.unpack_from(data)
    return kind == _SOCK_DIAG_BY_FAMILY and _is_repeated(data, length, 0, _START.size)


def _is_repeated(data: bytes, length: int, start: int, end: int) -> bool:
    """Whether some bytes of the first message are those of each."""
    times = len(data) // length
    return all(data[at::length] == data[at : at + 1] * times for at in range(start, end))


def _one_by_one(data: bytes) -> Iterator[tuple[Row, tuple[int, int]]]:
    """Each message's fields, and where its attributes begin and end."""
    offset = 0
    while offset < len(data):
        length, kind = _START.unpack_from(data, offset)
        if not _HEADER.size <= length <= len(data) - offset:
            raise _malformed()
        if kind == _SOCK_DIAG_BY_FAMILY:
            yield _MESSAGE.unpack_from(data, offset), (offset + _MESSAGE.size, offset + length)
        offset += (length + 3) & ~3


def _info(data: bytes, offset: int, end: int) -> bytes | None:
    start, end = _attribute(data, offset, end)
    return data[start:end] if start else None


def _attribute(data: bytes, offset: int, end: int) -> tuple[int, int]:
    """Where `struct tcp_info` begins and ends; nowhere is 0."""
    while offset < end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if not _ATTRIBUTE.size <= length <= end - offset:
            raise _malformed()
        if kind == _INET_DIAG_INFO:
            return offset + _ATTRIBUTE.size, offset + length
        offset += (length + 3) & ~3
    return 0, 0
