"""Messages between two processes: JSON documents over a UNIX socket, each in one line.

Each is bounded in size, and in the time that it may take in all. Who is at the other end, the
kernel says. Both ends may be in a program that closes descriptors, forks, or has green threads: no
socket object keeps a number, and a green thread lets others run while it waits.
"""

from __future__ import annotations

import _socket
import json
import os
import struct
from collections.abc import Callable, Container, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar

from closewait_guard._clock import now, pause, select
from closewait_guard._descriptors import Identity, OwnedDescriptor, identity_of
from closewait_guard.exceptions import CloseWaitGuardError

__all__ = [
    "MAX_BYTES",
    "Listener",
    "MessageSocket",
    "Peer",
    "RemoteError",
    "TooLargeError",
]


MAX_BYTES = 16_000_000
_PIECE = 1 << 16
# Two callers at once; others wait, or are refused by the kernel.
_BACKLOG = 2
# The program may have SIGPIPE end it.
_FLAGS = getattr(_socket, "MSG_NOSIGNAL", 0)
_T = TypeVar("_T")


class RemoteError(CloseWaitGuardError):
    """No message came through; the text is one sentence that says why.

    Its cause, where there is one, is what the system has said.
    """


class TooLargeError(RemoteError):
    """A message of this process is too large to be sent."""


class Peer(NamedTuple):
    """The process at the other end, as the kernel knows it: who connected, or began to listen.

    Attributes:
        pid: In the namespace of this process; 0 if it has no number there.
        uid: Its effective user at that moment.
    """

    pid: int
    uid: int


class _OwnSocket:
    """A socket that no guard takes for one of the program; the program may close its number.

    Args:
        fd: A stream socket, which is taken over.
        lets_green_run: Whether it is used by a green thread, which may not block the others.
    """

    def __init__(self, fd: int, *, lets_green_run: bool = False) -> None:
        self._descriptor = _take(fd)
        self._lets_green_run = lets_green_run

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
            yield sock
        finally:
            sock.detach()

    def _call(self, function: Callable[[_socket.socket], _T], end: float) -> _T:
        """What a call of the socket returns, which waits no longer than until a time."""
        while True:
            with self._object() as sock, suppress(BlockingIOError):
                # In any case, because the program may have set a default.
                sock.settimeout(0 if self._lets_green_run else None)
                _limit_waiting(sock, end - now())
                return function(sock)
            if now() >= end:
                raise TimeoutError
            if self._lets_green_run:
                pause(_PAUSE)


# How often a green thread asks.
_PAUSE = 0.02


def _limit_waiting(sock: _socket.socket, seconds: float) -> None:
    """Have the kernel limit it. A timeout of Python's would wait in poll().

    From outside a thread in there may be using any descriptor of the process, and what it has
    inherited would count as used.
    """
    whole, part = divmod(max(seconds, _SHORTEST), 1.0)
    limit = struct.pack("@ll", int(whole), int(part * 1e6))
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, limit)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, limit)


# Zero would be no limit.
_SHORTEST = 0.001
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
        try:
            with closing(_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)) as sock:
                # A UNIX socket connects at once, or waits while too many others do.
                sock.settimeout(None)
                _limit_waiting(sock, timeout)
                sock.connect(path)
                return cls(sock.detach())
        except BlockingIOError as error:
            raise RemoteError(_silent(timeout)) from error
        except OSError as error:
            raise RemoteError(f"cannot connect to {path}: {_reason(error)}") from error

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
            raise RemoteError(f"cannot see which process is connected: {_reason(error)}") from error
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

    def send(self, message: object, timeout: float, at_most: int = MAX_BYTES) -> None:
        """Send what JSON can hold.

        Args:
            message: The message.
            timeout: Seconds for all of it.
            at_most: How many bytes it may have.

        Raises:
            TooLargeError: It has more; nothing was sent.
            RemoteError: It was not taken in that time.
        """
        rest = memoryview(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        if len(rest) > at_most:
            raise TooLargeError(f"the message is larger than {at_most:,} bytes")
        end = now() + timeout
        while rest:
            send = partial(_send_piece, rest[:_PIECE])
            with _explained(timeout):
                rest = rest[self._call(send, end) :]

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
                piece = self._call(lambda sock: sock.recv(_PIECE), end)
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
        lets_green_run: Whether it is used by a green thread, which may not block the others.

    Raises:
        RemoteError: It cannot listen there.
    """

    def __init__(self, path: str, *, lets_green_run: bool = False) -> None:
        self.path = path
        self._identity: Identity | None = None
        try:
            with closing(_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)) as sock:
                sock.bind(path)
                # Before it listens: until then no one can connect.
                os.chmod(path, 0o600)  # noqa: PTH101 - pathlib is slow to load
                self._identity = identity_of(path)
                sock.listen(_BACKLOG)
                super().__init__(sock.detach(), lets_green_run=lets_green_run)
        except OSError as error:
            self._remove()
            raise RemoteError(f"cannot listen at {path}: {_reason(error)}") from error

    @property
    def is_reachable(self) -> bool:
        """Whether it is open, and still what its path leads to."""
        return self.fileno() >= 0 and identity_of(self.path) == self._identity

    def wait(self, seconds: float) -> bool:
        """Wait until a process connects; return whether one has. A green thread does not wait."""
        fd = self.fileno()
        if fd < 0:
            return False
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(0 if self._lets_green_run else seconds * 1000))

    def accept(self, timeout: float) -> MessageSocket:
        """The next connection. Who has connected is for the caller to check.

        Raises:
            RemoteError: There was none in that time, or none can be taken.
        """
        end = now() + timeout
        with _explained(timeout):
            fd = self._call(_accept, end)
            return MessageSocket(fd, lets_green_run=self._lets_green_run)

    def close(self) -> None:
        """Close it, and remove it from its folder, unless another is there. Idempotent."""
        super().close()
        self._remove()

    def close_copy(self) -> None:
        """Close it in a forked child: the file is the parent's."""
        super().close()

    def _remove(self) -> None:
        if self._identity is not None and identity_of(self.path) == self._identity:
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
    except TimeoutError as error:
        raise RemoteError(_silent(timeout)) from error
    except ConnectionError as error:
        raise RemoteError(_CLOSED) from error
    except OSError as error:
        raise RemoteError(f"the connection failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
