"""Questions about open descriptors: identity, waiting bytes, kind of socket, how many are open.

Also the descriptors that the guard opens for itself, which the program may close at any time.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeAlias

from closewait_guard._clock import now
from closewait_guard._interruptions import interrupts, refusals

__all__ = [
    "Identity",
    "NativeListing",
    "OwnedDescriptor",
    "SpareDescriptors",
    "ask_or_none",
    "fd_limit",
    "fd_used",
    "identity_of",
    "inode_of",
    "is_listening",
    "is_owned",
    "is_socket_of",
    "numbers_to_try",
    "own_socket",
    "owned_pipe",
    "peer_at",
    "socket_inode_of",
    "sockets_besides",
    "sockets_of_process",
    "tcp_info_of",
    "unread",
    "unsent",
]


# Not that of `os`, which gevent replaces by one that closes when its loop comes to it.
_close: Callable[[int], None] = getattr(sys.modules.get(os.name), "close", os.close)

try:
    import fcntl
    import resource
    import termios
except ImportError:  # Windows
    fcntl = resource = termios = None  # type: ignore[assignment]

Identity: TypeAlias = tuple[int, int, int]

# C code and child processes write to the numbers below, whatever is open there.
_FIRST_AFTER_STANDARD_STREAMS = 3


def inode_of(fd: int) -> int | None:
    """What distinguishes one open descriptor from the next that gets its number."""
    try:
        return os.fstat(fd).st_ino
    except OSError as error:
        if interrupts(error):
            raise
        return None


def identity_of(place: int | str) -> Identity | None:
    """The device, inode and kind of what is open at a number, or at a path; None if nothing is."""
    try:
        status = os.lstat(place) if isinstance(place, str) else os.fstat(place)
    except OSError:
        return None
    return status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)


def socket_inode_of(fd: int) -> int | None:
    """The inode of an open socket; None if the number is free, or that of something else."""
    identity = identity_of(fd)
    return identity[1] if identity is not None and identity[2] == stat.S_IFSOCK else None


class OwnedDescriptor:
    """A descriptor that the guard has opened for itself, and uses only while it is still that one.

    A program may close every number that it does not know, as `os.closerange` does; what it opens
    next gets the same numbers. So ask `fileno()` immediately before each use, and end by `close()`.

    Args:
        fd: What has just been opened. If its number is too small, it is closed and replaced by a
            copy; without room for one it is closed all the same.
        at_least: The smallest number that it may have: above those of the standard streams, which
            a program may run without.
    """

    def __init__(self, fd: int, at_least: int = _FIRST_AFTER_STANDARD_STREAMS) -> None:
        self._fd = _moved(fd, at_least)
        self._identity = identity_of(self._fd)
        if self._identity is not None:
            _owned[self._fd] = self._identity

    def fileno(self) -> int:
        """Its number; -1, which every call refuses, as soon as the program has closed it."""
        if self._fd >= 0 and identity_of(self._fd) != self._identity:
            self._fd = -1
        return self._fd

    def close(self) -> None:
        """Close it, unless the program has. Idempotent."""
        fd = self.fileno()
        self._fd = -1
        if fd >= 0:
            _owned.pop(fd, None)
            with suppress(OSError):
                _close(fd)


# Those that have not been closed, as they were when they were opened.
_owned: dict[int, Identity] = {}


def is_owned(fd: int, identity: Identity) -> bool:
    """Whether the guard has opened for itself what is open at a number."""
    return identity in (_owned.get(fd), own_socket)


def owned_pipe(
    at_least: int = _FIRST_AFTER_STANDARD_STREAMS,
) -> tuple[OwnedDescriptor, OwnedDescriptor]:
    """The reading and the writing end of a new pipe.

    Raises:
        OSError: There is no room for it.
    """
    reading, writing = os.pipe()
    try:
        first = OwnedDescriptor(reading, at_least)
    except OSError:
        _close(writing)
        raise
    try:
        return first, OwnedDescriptor(writing, at_least)
    except OSError:
        first.close()
        raise


# Above the numbers that a program expects for what it opens first.
_LOWEST_SPARE = 32


class SpareDescriptors:
    """Both ends of a pipe, kept for what is loaded when the program has taken all others."""

    def __init__(self) -> None:
        self._ends: tuple[OwnedDescriptor, ...] = ()

    def acquire(self) -> bool:
        """Open the pipe, if that has not been done and there is room; return whether it is open."""
        if not self._ends:
            with suppress(OSError):
                self._ends = owned_pipe(_LOWEST_SPARE)
        return bool(self._ends)

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Have its descriptors free to use meanwhile: an import needs one."""
        self.release()
        try:
            yield
        finally:
            self.acquire()

    def release(self) -> None:
        """Close it: its descriptors are free to use."""
        ends, self._ends = self._ends, ()
        for end in ends:
            end.close()


def _moved(fd: int, at_least: int) -> int:
    if fd >= at_least or fcntl is None:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, at_least)
    finally:
        _close(fd)


_FIONREAD: int = getattr(termios, "FIONREAD", 0)
_TIOCOUTQ: int = getattr(termios, "TIOCOUTQ", 0)


def unread(fd: int) -> int | None:
    """Bytes that wait to be read; None where the platform does not say."""
    return _queued(fd, _FIONREAD)


def unsent(fd: int) -> int | None:
    """Bytes that the peer has not acknowledged; None where the platform does not say."""
    return _queued(fd, _TIOCOUTQ)


def _queued(fd: int, request: int) -> int | None:
    if fcntl is None:
        return None
    try:
        return int.from_bytes(fcntl.ioctl(fd, request, b"\0\0\0\0"), sys.byteorder)
    except Exception as error:
        refusals.note(error)
        return None


_getsockopt = _socket.socket.getsockopt


def ask_or_none(ask: Callable[..., Any], *question: object) -> Any:
    """The answer of the kernel; None where it has none."""
    try:
        return ask(*question)
    except OSError as error:
        if interrupts(error):
            raise
        return None


def peer_at(fd: int) -> object:
    """The address to which a socket without an object is connected; None if it has none.

    A copy is asked: the object that it needs would close the number itself if it were interrupted.
    """
    copy = ask_or_none(os.dup, fd)
    if copy is None:
        return None
    try:
        sock = _socket.socket(fileno=copy)
    except OSError:
        _close(copy)
        return None
    try:
        return ask_or_none(_socket.socket.getpeername, sock)
    finally:
        sock.close()


def is_listening(sock: _socket.socket) -> bool:
    """Whether the socket waits for connections."""
    return bool(ask_or_none(_getsockopt, sock, socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


# Up to the number of segments with data that were sent.
_TCP_INFO_SIZE = 160


def tcp_info_of(sock: _socket.socket) -> bytes:
    """Linux's `struct tcp_info`; empty where there is none."""
    with suppress(AttributeError, OSError):
        return _getsockopt(sock, _socket.IPPROTO_TCP, _socket.TCP_INFO, _TCP_INFO_SIZE)
    return b""


# The one that the guard itself keeps open, if it does: a line to `run`.
own_socket: Identity | None = None

_FD_FOLDER = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"


def fd_limit() -> int | None:
    """The soft limit on open descriptors; None where there is none, or it is not known."""
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


class _Used:
    """Counts the open descriptors. A count that took long is good for a while."""

    def __init__(self) -> None:
        self._listed, self._good_until = 0, 0.0

    def __call__(self) -> int | None:
        """How many descriptors are open; None where it is not known."""
        try:
            # Since Linux 6.2 the folder's size is the count: no descriptor is needed to learn it,
            # which matters when there is none left.
            size = os.stat(_FD_FOLDER).st_size  # noqa: PTH116 - pathlib is slow to load
            return size if sys.platform == "linux" and size else self._by_listing()
        except Exception as error:
            refusals.note(error)
            return fd_limit() if getattr(error, "errno", None) in _EXHAUSTED else None

    def _by_listing(self) -> int:
        """Takes a microsecond for each, more than all the rest of a scan."""
        started = now()
        if started >= self._good_until:
            self._listed = len(_names()) - 1
            took = now() - started
            self._good_until = started + (took / _MAX_SHARE if took > _LONG else 0.0)
        return self._listed


fd_used = _Used()
_EXHAUSTED = frozenset({errno.ENFILE, errno.EMFILE})
_LONG, _MAX_SHARE = 0.001, 0.05


def _names() -> list[str]:
    # A path object for each name would take ten times as long.
    return os.listdir(_FD_FOLDER)  # noqa: PTH208


def numbers_to_try() -> tuple[Iterable[int], int]:
    """The numbers at which descriptors may be open, and at how many of them there are.

    Raises:
        Exception: They cannot be listed, and are too many to be tried one by one.
    """
    try:
        names = _names()
    except Exception as error:
        refusals.note(error)
        count, limit = fd_used(), fd_limit() or _MAX_NUMBERS
        if count is None and limit > _MAX_NUMBERS:
            raise
        # The limit may have been higher before.
        return range(limit if count is None else max(limit, _MAX_NUMBERS)), count or limit
    return map(int, names), len(names)


# A number that is free takes a microsecond or two.
_MAX_NUMBERS = 65_536


def sockets_besides(is_known: Callable[[int], bool]) -> dict[int, int] | None:
    """The program's open sockets that are not known, with their inodes; None where it is not known.

    One listing of a folder, whatever their number; only what is not known is looked at. Where there
    is no descriptor left for the listing, the numbers are tried until all are found.
    """
    try:
        numbers, left = numbers_to_try()
    except Exception:
        return None
    found: dict[int, int] = {}
    for fd in numbers:
        if not is_known(fd):
            try:
                status = os.fstat(fd)
            except OSError:
                continue
            kind = stat.S_IFMT(status.st_mode)
            identity = status.st_dev, status.st_ino, kind
            if kind == stat.S_IFSOCK and not is_owned(fd, identity):
                found[fd] = status.st_ino
        left -= 1
        if not left:
            break
    return found


class _Tracked(Protocol):
    """What is asked of the registry."""

    def is_tracked(self, fd: int) -> bool: ...
    def mark(self) -> int: ...


class NativeListing(NamedTuple):
    """The open sockets without a socket object at one moment.

    Attributes:
        at: When.
        pid: In which process.
        mark: Socket objects that were opened after this mark are not known to it.
        found: By descriptor, their inodes; None where they cannot be listed.
    """

    at: float
    pid: int
    mark: int
    found: dict[int, int] | None

    @classmethod
    def take(cls, tracked: _Tracked) -> NativeListing:
        """Now."""
        # Before the listing: what is opened meanwhile is newer than what is found.
        mark = tracked.mark()
        return cls(now(), os.getpid(), mark, sockets_besides(tracked.is_tracked))


def sockets_of_process(
    pid: int, likely: frozenset[int] | None = None, at_most: int | None = None
) -> tuple[int, dict[int, int]]:
    """How many descriptors a process has open; the inodes of those that are sockets. Linux only.

    Args:
        pid: The process.
        likely: Read only these of a process that has a great many.
        at_most: Read no more than so many.
    """
    folder = OwnedDescriptor(os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY))
    try:
        names = os.listdir(folder.fileno())  # noqa: PTH208 - pathlib reads no open folder
        wanted: Iterable[str] = names
        if likely is not None and len(names) > max(_MAX_DESCRIPTORS_READ_WHOLE, len(likely)):
            wanted = {str(fd) for fd in likely}.intersection(names)
        sockets = _inodes(folder.fileno(), islice(wanted, at_most))
    finally:
        folder.close()
    return len(names), sockets


def is_socket_of(pid: int, fd: int, inode: int) -> bool:
    """Whether a process has this socket at a number, as far as that may be seen. Linux only."""
    try:
        return os.stat(f"/proc/{pid}/fd/{fd}").st_ino == inode  # noqa: PTH116
    except OSError:
        return False


_MAX_DESCRIPTORS_READ_WHOLE = 200


def _inodes(folder: int, names: Iterable[str]) -> dict[int, int]:
    readlink = os.readlink
    sockets: dict[int, int] = {}
    for name in names:
        try:
            target = readlink(name, dir_fd=folder)
        except FileNotFoundError:
            # It has been closed since the folder was read.
            continue
        if target.startswith("socket:["):
            sockets[int(name)] = int(target[8:-1])
    return sockets
