"""Messages between two processes: JSON documents over a UNIX socket, each in one line.

Each is bounded in size, and in the time that it may take in all. Who is at the other end, the
kernel says. Both ends may be in a program that closes descriptors, forks, or has green threads: no
socket object keeps a number, and what waits lets green threads run.
"""

from __future__ import annotations

import _socket
import json
import os
import select
import struct
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar

from closewait_guard._clock import now
from closewait_guard._descriptors import Identity, OwnedDescriptor
from closewait_guard.exceptions import CloseWaitGuardError

__all__ = [
    "MAX_BYTES",
    "Listener",
    "MessageSocket",
    "Peer",
    "RemoteError",
]


MAX_BYTES = 16_000_000
_PIECE = 1 << 16
# Two callers at once; others wait, or are refused by the kernel.
_BACKLOG = 2
# The program may have SIGPIPE end it.
_FLAGS = getattr(_socket, "MSG_NOSIGNAL", 0)
_T = TypeVar("_T")


class RemoteError(CloseWaitGuardError):
    """No message came through; the text is one sentence that says why."""


class Peer(NamedTuple):
    """The process at the other end, as the kernel knows it: who connected, or began to listen.

    Attributes:
        pid: In the namespace of this process; 0 if it has no number there.
        uid: Its effective user at that moment.
    """

    pid: int
    uid: int


class _OwnSocket:
    """A socket that no guard takes for one of the program; the program may close its number."""

    def __init__(self, fd: int) -> None:
        self._descriptor = _take(fd)

    def fileno(self) -> int:
        """Its number; -1 once it is closed."""
        return self._descriptor.fileno()

    def close(self) -> None:
        """Close it, unless the program has. Idempotent."""
        self._descriptor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    @contextmanager
    def _object(self) -> Iterator[_socket.socket]:
        """An object for the number, for one call; it must not close what it does not own."""
        fd = self.fileno()
        if fd < 0:
            raise RemoteError("the connection was closed by the program itself")
        sock = _socket.socket(fileno=fd)
        try:
            # Whatever the program has made the default.
            sock.settimeout(0)
            yield sock
        finally:
            sock.detach()

    def _call(self, function: Callable[[_socket.socket], _T], event: int, end: float) -> _T:
        """What a call of the socket returns, as soon as it need not wait."""
        while True:
            with self._object() as sock, suppress(BlockingIOError):
                fd = sock.fileno()
                return function(sock)
            if not _wait(fd, event, end):
                raise TimeoutError


# Out of the way of the numbers that programs count on.
_LOWEST_NUMBER = 64


def _take(fd: int) -> OwnedDescriptor:
    """Under a high number, where the limit leaves room for that."""
    try:
        high = OwnedDescriptor(os.dup(fd), _LOWEST_NUMBER)
    except OSError:
        return OwnedDescriptor(fd)
    OwnedDescriptor(fd).close()
    return high


class MessageSocket(_OwnSocket):
    """One end of a connection.

    Args:
        fd: A connected stream socket, which is taken over.
    """

    @classmethod
    def to(cls, path: str, timeout: float) -> Self:
        """Connect to what listens at a path.

        Raises:
            RemoteError: Nothing answers there.
        """
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            # A UNIX socket connects at once, or waits while too many others do.
            sock.settimeout(timeout)
            sock.connect(path)
            return cls(sock.detach())
        except TimeoutError:
            raise RemoteError(_silent(timeout)) from None
        except OSError as error:
            raise RemoteError(f"cannot connect to {path}: {_reason(error)}") from None
        finally:
            sock.close()

    @property
    def peer(self) -> Peer:
        """The process at the other end.

        Raises:
            RemoteError: The kernel does not say.
        """
        try:
            with self._object() as sock:
                credentials = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
        except (AttributeError, OSError) as error:
            raise RemoteError(f"cannot see which process is connected: {_reason(error)}") from None
        pid, uid, _ = struct.unpack("iII", credentials)
        return Peer(pid, uid)

    def require_peer(self, *, users: Container[int] | None = None, pid: int | None = None) -> Peer:
        """The process at the other end, if it is one that may be listened to and answered.

        Args:
            users: Whose it must be; this user's or root's by default.
            pid: Which it must be, if that is known.

        Raises:
            RemoteError: It is another's, or another.
        """
        peer = self.peer
        wanted = "neither this user nor root" if users is None else "not the expected one"
        if peer.uid not in ({os.geteuid(), 0} if users is None else users):
            raise RemoteError(f"process {peer.pid} belongs to user {peer.uid}, which is {wanted}")
        if pid is not None and peer.pid != pid:
            raise RemoteError(f"process {peer.pid} is connected, instead of process {pid}")
        return peer

    def send(self, message: object, timeout: float) -> None:
        """Send what JSON can hold.

        Raises:
            RemoteError: It was not taken in that time, or is too large.
        """
        rest = memoryview(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        if len(rest) > MAX_BYTES:
            raise RemoteError(f"the message is larger than {MAX_BYTES:,} bytes")
        end = now() + timeout
        while rest:
            send = partial(_send_piece, rest[:_PIECE])
            with _explained(timeout):
                rest = rest[self._call(send, _OUT, end) :]

    def receive(self, timeout: float, at_most: int = MAX_BYTES) -> dict[str, Any]:
        """The message of the other end, which must be a JSON object.

        Args:
            timeout: Seconds for all of it.
            at_most: How many bytes it may have.

        Raises:
            RemoteError: It has not come in that time, is too large, or is no such thing.
        """
        try:
            message = json.loads(self._receive_line(timeout, at_most))
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise RemoteError("the other process sent something other than a JSON object")
        return message

    def _receive_line(self, timeout: float, at_most: int) -> bytes:
        found, end = bytearray(), now() + timeout
        while b"\n" not in found[-_PIECE:]:
            with _explained(timeout):
                piece = self._call(lambda sock: sock.recv(_PIECE), _IN, end)
            found += piece
            if not piece:
                raise RemoteError(_CLOSED)
            if len(found) > at_most:
                raise RemoteError(f"the other process sent more than {at_most:,} bytes")
        return bytes(found).partition(b"\n")[0]


def _send_piece(piece: memoryview, sock: _socket.socket) -> int:
    return sock.send(piece, _FLAGS)


def _accept(listener: _socket.socket) -> int:
    fd: int = listener._accept()[0]  # type: ignore[attr-defined]
    return fd


class Listener(_OwnSocket):
    """Listens at a path, for processes of this user and of root.

    Args:
        path: No file may be there. Its folder must be one that no other user can write to.

    Raises:
        RemoteError: It cannot listen there.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._identity: Identity | None = None
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            sock.bind(path)
            # Before it listens: until then no one can connect.
            os.chmod(path, 0o600)  # noqa: PTH101 - pathlib is slow to load
            self._identity = _identity_at(path)
            sock.listen(_BACKLOG)
            super().__init__(sock.detach())
        except OSError as error:
            self._remove()
            raise RemoteError(f"cannot listen at {path}: {_reason(error)}") from None
        finally:
            sock.close()

    @property
    def is_reachable(self) -> bool:
        """Whether it is open, and still what its path leads to."""
        return self.fileno() >= 0 and _identity_at(self.path) == self._identity

    def wait(self, seconds: float) -> bool:
        """Wait until a process connects; return whether one has."""
        fd = self.fileno()
        return fd >= 0 and _wait(fd, _IN, now() + seconds)

    def accept(self, timeout: float) -> MessageSocket:
        """The next connection. Who has connected is for the caller to check.

        Raises:
            RemoteError: There was none in that time, or none can be taken.
        """
        end = now() + timeout
        with _explained(timeout):
            return MessageSocket(self._call(_accept, _IN, end))

    def close(self) -> None:
        """Close it, and remove it from its folder, unless another is there. Idempotent."""
        super().close()
        self._remove()

    def _remove(self) -> None:
        if self._identity is not None and _identity_at(self.path) == self._identity:
            with suppress(OSError):
                os.unlink(self.path)  # noqa: PTH108


_CLOSED = "the other process closed the connection before its message was complete"


def _silent(timeout: float) -> str:
    return f"the other process did not answer within {timeout:g} s"


@contextmanager
def _explained(timeout: float) -> Iterator[None]:
    """Have each failure of a call raised as one sentence."""
    try:
        yield
    except TimeoutError:
        raise RemoteError(_silent(timeout)) from None
    except ConnectionError:
        raise RemoteError(_CLOSED) from None
    except OSError as error:
        raise RemoteError(f"the connection failed: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _identity_at(path: str) -> Identity | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mode


# The numbers of poll(), which no platform has otherwise.
_IN, _OUT = 1, 4


def _wait(fd: int, event: int, end: float) -> bool:
    """Wait until a descriptor is ready, or until a time; return whether it is.

    What `select` has is looked up at each call: gevent and eventlet put there what lets green
    threads run meanwhile.
    """
    left = max(0.0, end - now())
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(fd, event)
        return bool(poll.poll(left * 1000))
    reading, writing = ([fd], []) if event == _IN else ([], [fd])
    return any(select.select(reading, writing, [], left))
