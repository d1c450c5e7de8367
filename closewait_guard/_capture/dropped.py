"""What the kernel says of a socket that dies open: asked in its finalizer, read when it is told.

Nothing may be imported in a finalizer, so this is loaded before. What reads it is not: most runs of
tests drop no socket.


A count that finalizers and signal handlers may raise, because raising it takes no lock.

The sockets that were finalized while open: the youngest are remembered, all are counted.

Births that are over, as far as their sockets go, and whose numbers are open all the same.

Such a socket may be in the middle of its end: an object that closes lets go of its number before
the kernel does, and the collector clears weak references before it calls finalizers. Or it has
ended, and native code has been given the number since. The one passes, the other stays.
"""

from __future__ import annotations

import _socket
import itertools
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from closewait_guard._capture.creation import SOCK, CreationTuple, pop_if_same
from closewait_guard._clock import now
from closewait_guard._descriptors import inode_of, socket_inode_of, unread, unsent
from closewait_guard._interruptions import interrupts
from closewait_guard._live import is_a, module_dict

__all__ = [
    "DroppedSocket",
    "DroppedSockets",
    "Endings",
    "FinalSnapshot",
    "LockFreeCounter",
    "ask_or_none",
    "is_listening",
    "is_tls",
]


# More than any kernel's has.
_TCP_INFO_SIZE = 512
_TCP_INFO = getattr(socket, "TCP_INFO", 0) if sys.platform == "linux" else 0

# Past the properties of Python's class, which make an enum of each number.
_family = vars(_socket.socket)["family"].__get__
_type = vars(_socket.socket)["type"].__get__
_proto = vars(_socket.socket)["proto"].__get__
_getsockopt = _socket.socket.getsockopt


class FinalSnapshot:
    """The answers as they were given; None where there was none."""

    __slots__ = (
        "family",
        "inode",
        "listening",
        "local",
        "peer",
        "proto",
        "tcp_info",
        "tls",
        "type",
        "unread",
        "unsent",
    )

    def __init__(self, sock: _socket.socket, fd: int) -> None:
        self.family: int = _family(sock)
        self.type: int = _type(sock)
        self.proto: int = _proto(sock)
        self.local = ask_or_none(_socket.socket.getsockname, sock)
        self.peer = ask_or_none(_socket.socket.getpeername, sock)
        self.inode = inode_of(fd)
        self.tls = is_tls(sock)
        self.listening = is_listening(sock)
        self.tcp_info = self.unread = self.unsent = None
        if self.type == socket.SOCK_STREAM:
            self.unread, self.unsent = unread(fd), unsent(fd)
            if _TCP_INFO:
                self.tcp_info = ask_or_none(
                    _getsockopt, sock, socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_SIZE
                )


def ask_or_none(ask: Callable[..., Any], *question: object) -> Any:
    """The kernel's answer; None where it has none."""
    try:
        return ask(*question)
    except OSError as error:
        if interrupts(error):
            raise
        return None


def is_listening(sock: _socket.socket) -> bool:
    """Whether the socket waits for connections."""
    return bool(ask_or_none(_getsockopt, sock, socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def is_tls(sock: _socket.socket) -> bool:
    """Whether it is a socket of Python's ssl, which a program without TLS does not load."""
    if type(sock) is socket.socket:
        return False
    # Neither the socket nor whatever stands there for the module is asked anything.
    variables = module_dict(sys.modules.get("ssl"))
    return variables is not None and is_a(sock, variables.get("SSLSocket", type(None)))


class LockFreeCounter:
    """Numbers events. `count()` gives each event its number; only reading takes a lock."""

    def __init__(self) -> None:
        self.count = itertools.count(1).__next__
        self._uncounted = 0
        self._reading = threading.RLock()

    def mark(self) -> int:
        """A number above that of every event so far, and below that of the next."""
        with self._reading:
            self._uncounted += 1
            return self.count()

    def total(self) -> int:
        """How many events there have been, in this process."""
        with self._reading:
            return self.mark() - self._uncounted

    def after_fork(self) -> None:
        """In the child: begin at nought again, though the numbers go on.

        A lock that another thread held at the fork would never be released.
        """
        self._reading = threading.RLock()
        self._uncounted = self.count()


class DroppedSocket:
    """A socket that was finalized while it was open, and the kernel's last word on it."""

    __slots__ = ("collected", "fd", "remains", "story")

    def __init__(self, story: CreationTuple, sock: socket.socket, fd: int) -> None:
        self.story = story
        self.fd = fd
        # The collector clears weak references before it finalizes; a last reference that goes
        # finalizes first.
        self.collected = story[SOCK]() is None
        self.remains = FinalSnapshot(sock, fd)


class DroppedSockets:
    """Written to in finalizers: nothing here takes a lock, but for the count when it is read.

    Attributes:
        kept: The youngest.
    """

    def __init__(self, kept: int) -> None:
        self.kept: deque[DroppedSocket] = deque(maxlen=kept)
        self.tally = LockFreeCounter()

    def add(self, story: CreationTuple, sock: socket.socket, fd: int) -> None:
        """Look at a dying socket for the last time."""
        self.kept.append(DroppedSocket(story, sock, fd))
        self.tally.count()

    def youngest(self) -> tuple[DroppedSocket, ...]:
        """Those that are remembered."""
        return tuple(self.kept.copy())

    def after_fork(self) -> None:
        """In the child: those before were the parent's affair."""
        self.kept.clear()
        self.tally.after_fork()


# A collection in which finalizers wait for something may take long.
_LONGEST = 60.0


class _Ending(NamedTuple):
    """When the end of a birth was noticed, and which socket had its number then."""

    story: CreationTuple
    inode: int
    since: float


class Endings:
    """Tells births that are over from those that are about to be."""

    def __init__(self) -> None:
        self._noticed: dict[int, _Ending] = {}

    def is_over(self, fd: int, story: CreationTuple) -> bool:
        """Whether a birth whose socket is closed or gone needs to be known no longer."""
        inode, noticed = socket_inode_of(fd), self._noticed.get(fd)
        if inode is None:
            return True
        if noticed is None or noticed.story is not story:
            self._noticed[fd] = _Ending(story, inode, now())
            return False
        return inode != noticed.inode or now() - noticed.since > _LONGEST

    def forget_all_but(self, births: Mapping[int, CreationTuple]) -> None:
        """Let go of those that are known no longer, or whose numbers have been given away."""
        for fd, ending in self._noticed.copy().items():
            if births.get(fd) is not ending.story:
                pop_if_same(self._noticed, fd, ending)
