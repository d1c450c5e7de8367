"""The sockets that were dropped: finalized while they were open.

The kernel is asked about each in its finalizer, and the latest of the answers are kept. Nothing may
be imported in a finalizer, so this is loaded before; what reads the answers is not, because most
runs of tests drop no socket. Also the alarm for the moment when no descriptor is left for a socket.
"""

from __future__ import annotations

import _socket
import itertools
import socket
import sys
import threading
from _thread import get_ident
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

from closewait_guard._capture.creation import OBJECT_ID, SOCK, CreationTuple, pop_if_same
from closewait_guard._clock import now
from closewait_guard._cpython import (
    EXECUTOR_THREADS,
    IS_SHUTTING_DOWN,
    JOIN_AT_EXIT,
    current_frame,
    has_gil,
)
from closewait_guard._descriptors import (
    ask_or_none,
    inode_of,
    is_listening,
    socket_inode_of,
    unread,
    unsent,
)
from closewait_guard._live import is_tls, referrers, running_frames
from closewait_guard._threads import allows_daemons

__all__ = [
    "MAX_COLLECTION",
    "DroppedSocket",
    "DroppedSockets",
    "EndedCreations",
    "FdExhaustionAlarm",
    "FinalSnapshot",
    "LockFreeCounter",
    "Probing",
    "is_garbage",
    "is_left_to_exit",
]


# Of those that one collection drops.
_MAX_LATEST = 1000
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


class LockFreeCounter:
    """Numbers events. `count()` gives each event its number; only reading takes a lock.

    Args:
        count: What else counts the same events, too.
    """

    def __init__(self, count: Callable[[], int] | None = None) -> None:
        self.count = count or itertools.count(1).__next__
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
        """In the child: count from zero again, though the numbers go on.

        A lock that another thread held at the fork would never be released.
        """
        self._reading = threading.RLock()
        self._uncounted = self.count()


# Between two threads that report.
_MIN_SECONDS_BETWEEN = 60.0


class FdExhaustionAlarm:
    """Counts the calls that found no descriptor left, and has a report made at once.

    It runs in the middle of the program's own failing call: it is quick and takes no descriptor.

    Args:
        report: Called in a thread of its own, at most once a minute.
        clock: Seconds that never jump.
    """

    def __init__(self, report: Callable[[], object], clock: Callable[[], float] = now) -> None:
        self._report = report
        self._clock = clock
        self._counter = LockFreeCounter()
        self._last: float | None = None

    @property
    def count(self) -> int:
        """How many calls have failed so far."""
        return self._counter.total()

    def __call__(self) -> None:
        self._counter.count()
        at = self._clock()
        is_due = self._last is None or at - self._last >= _MIN_SECONDS_BETWEEN
        # A thread that is started while the interpreter ends never runs, but would be joined.
        if is_due and not sys.is_finalizing() and allows_daemons():
            self._last = at
            # If no thread can be started, the next report has the count.
            with suppress(RuntimeError):
                threading.Thread(
                    target=self._report, name="closewait-guard-exhausted", daemon=True
                ).start()

    def after_fork(self) -> None:
        """In the child."""
        self._counter.after_fork()


class DroppedSocket:
    """A socket that was finalized while it was open, and what the kernel said of it then."""

    __slots__ = ("collected", "creation", "fd", "is_left_to_exit", "snapshot")

    def __init__(self, creation: CreationTuple, sock: socket.socket, fd: int) -> None:
        self.creation = creation
        self.fd = fd
        # A last reference that goes finalizes before weak references are cleared.
        self.collected = is_garbage(creation, sock)
        self.is_left_to_exit = is_left_to_exit()
        self.snapshot = FinalSnapshot(sock, fd)


class DroppedSockets:
    """Written to in finalizers: nothing here takes a lock, except to read the count.

    Attributes:
        recent: The latest, as many as are kept.
    """

    def __init__(self, recent: int) -> None:
        self.recent: deque[DroppedSocket] = deque(maxlen=recent)
        self.counter = LockFreeCounter()

    def add(self, creation: CreationTuple, sock: socket.socket, fd: int) -> None:
        """Take a snapshot of a socket that is being finalized, or closed by what is."""
        self.recent.append(DroppedSocket(creation, sock, fd))
        self.counter.count()

    def find_recent(self, sock: _socket.socket) -> DroppedSocket | None:
        """That of a socket which was dropped a moment ago, and is there still."""
        latest = islice(reversed(self.recent.copy()), _MAX_LATEST)
        return next((each for each in latest if each.creation[OBJECT_ID] == id(sock)), None)

    def as_tuple(self) -> tuple[DroppedSocket, ...]:
        """Those that are kept."""
        return tuple(self.recent.copy())

    def after_fork(self) -> None:
        """In the child: forget those of the parent."""
        self.recent.clear()
        self.counter.after_fork()


class Probing:
    """While a probe refers to a socket, the collector takes only what else does for garbage.

    Entered before the probe does, and left after: to enter it may begin a collection.
    """

    __slots__ = ("_what",)

    def __init__(self, creation: CreationTuple) -> None:
        self._what: tuple[int, int] = creation[OBJECT_ID], get_ident()

    def __enter__(self) -> None:
        _probed_now[self] = self._what

    def __exit__(self, *failure: object) -> None:
        del _probed_now[self]


# The address of each socket that is probed, and by which thread.
_probed_now: dict[Probing, tuple[int, int]] = {}


def is_garbage(creation: CreationTuple, sock: socket.socket) -> bool:
    """Whether a socket that a finalizer closes in a collection is garbage itself.

    The collector clears the weak references to garbage before it calls a finalizer, and none to
    what a finalizer of the program closes in time, such as the connections of a pool. What is being
    probed is garbage if nothing refers to it as far as the collector shows: neither the variables
    of running calls do that, nor other garbage.
    """
    if creation[SOCK]() is None:
        return True
    # Other threads may close it in time meanwhile; the thread that probes it closes nothing itself.
    # Where nothing is probed no call is made: near the recursion limit it would fail.
    is_probed_here = bool(_probed_now) and (id(sock), get_ident()) in _probed_now.values()
    return is_probed_here and has_gil() and not referrers((sock,))


def is_left_to_exit() -> bool:
    """Whether what is finalized now was kept for a thread that ends because the program does.

    A thread of an executor keeps clients in thread-local variables, as a module keeps its own. When
    these go, none of its functions runs any more. The same holds for what exit functions end. Any
    other thread has ended by itself: after the main thread, others may work on for days.
    """
    if not vars(threading).get(IS_SHUTTING_DOWN):
        return False
    frame = current_frame(0)
    while (caller := frame.f_back) is not None:
        frame = caller
    is_without_caller = frame.f_globals.get("__package__") == __package__
    return is_without_caller and (_is_thread_of_executor() or _have_threads_ended())


def _is_thread_of_executor() -> bool:
    # By the number that the system gives: that of a thread which has ended is given to the next.
    module, number = sys.modules.get("concurrent.futures.thread"), threading.get_native_id()
    queues = getattr(module, EXECUTOR_THREADS, None)
    return queues is not None and any(
        getattr(ref(), "native_id", None) == number for ref in queues.keyrefs()
    )


def _have_threads_ended() -> bool:
    """Whether the main thread waits for no other any more, and calls exit functions."""
    main_thread = threading.main_thread()
    # As it is in a child that another thread forks meanwhile.
    if main_thread.is_alive():
        return False
    frame = main = running_frames().get(main_thread.ident or 0)
    code = getattr(getattr(threading, JOIN_AT_EXIT, None), "__code__", None)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return main is not None and frame is None


# A collection in which finalizers wait for something may take long.
MAX_COLLECTION = 60.0


class _Ended(NamedTuple):
    """When the end of a socket was noticed, and which inode its descriptor had then."""

    creation: CreationTuple
    inode: int
    since: float


class EndedCreations:
    """Distinguishes the sockets that have ended from those that are about to.

    A closed or collected socket whose descriptor is open may be in the middle of its end: an object
    that closes lets go of its number before the kernel does, and the collector clears weak
    references before it calls finalizers. Or it has ended, and native code has been given the
    number since. The first passes, the second stays.
    """

    def __init__(self) -> None:
        self._noticed: dict[int, _Ended] = {}

    def has_ended(self, fd: int, creation: CreationTuple) -> bool:
        """Whether the creation of a socket that is closed or gone can be removed."""
        inode, noticed = socket_inode_of(fd), self._noticed.get(fd)
        if inode is None:
            return True
        if noticed is None or noticed.creation is not creation:
            self._noticed[fd] = _Ended(creation, inode, now())
            return False
        return inode != noticed.inode or now() - noticed.since > MAX_COLLECTION

    def keep_only(self, creations: Mapping[int, CreationTuple]) -> None:
        """Remove those whose creations were removed or replaced."""
        for fd, ending in self._noticed.copy().items():
            if creations.get(fd) is not ending.creation:
                pop_if_same(self._noticed, fd, ending)
