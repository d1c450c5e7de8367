"""The record of how a socket was created, a plain tuple; and of which other it was made."""

from __future__ import annotations

import _socket
import math
import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from itertools import compress
from operator import is_
from types import FrameType
from typing import Any, NamedTuple

from closewait_guard._capture import patch
from closewait_guard._capture.hooks import SOCKET, code_of, listener_in_accept_by_thread
from closewait_guard._capture.stack import NO_STACK, CapturedStack
from closewait_guard._cpython import (
    INNER_SOCKET,
    file_objects_reader,
    is_closed_reader,
    weak_reference,
)
from closewait_guard._descriptors import inode_of, socket_inode_of, tcp_info_of
from closewait_guard._enums import Origin, Scalar
from closewait_guard._live import (
    field,
    is_a,
    kinds_of,
    text_of,
    value_at,
    variable_of,
    weak_instances_of,
)
from closewait_guard._threads import descendants_of

__all__ = [
    "NO_CONTEXT",
    "OBJECT_ID",
    "ORIGIN",
    "PARENT",
    "PID",
    "SERIAL",
    "SOCK",
    "STACK",
    "Creation",
    "CreationTuple",
    "ForkedSocket",
    "OpenSockets",
    "SocketsAtFork",
    "as_parent",
    "closed_among",
    "count_files",
    "is_made_by",
    "library_constructors",
    "may_be_open",
    "no_socket",
    "origin_of",
    "pop_if_same",
    "still_owns",
    "unknown_creation",
    "untracked_sockets",
    "was_closed",
    "with_serial",
]


# Making a named tuple would take three times as long.
CreationTuple = tuple[Any, ...]
SOCK, OBJECT_ID, SERIAL, PID, ORIGIN, PARENT, STACK = 0, 1, 2, 3, 9, 10, 11

# Bounds what `sock = sock.dup()` in a loop can pile up; the root of the line is always kept.
_MAX_ANCESTORS = 16

NO_CONTEXT: dict[str, Scalar] = {}

_fileno = _socket.socket.fileno
# Of the socket class only.
_is_closed = is_closed_reader(SOCKET, _fileno)
_file_objects = file_objects_reader(SOCKET)


def unknown_creation(sock: socket.socket, serial: int, pid: int) -> CreationTuple:
    """The creation of a socket that was opened before it could be recorded."""
    when, thread, task, labels, parent = None, "", None, (), None
    return (
        weak_reference(sock),
        id(sock),
        serial,
        pid,
        when,
        thread,
        task,
        labels,
        NO_CONTEXT,
        Origin.ADOPTED,
        parent,
        NO_STACK,
    )


def still_owns(creation: CreationTuple, fd: int) -> bool:
    """Whether the socket of a creation still exists, and this is its descriptor."""
    sock = creation[SOCK]()
    return sock is not None and _fileno(sock) == fd


def no_socket() -> None:
    """In place of a weak reference to a socket: what one answers when its object is gone."""


def may_be_open(fd: int, creation: CreationTuple) -> bool:
    """Whether the socket of a creation is open, as far as is known."""
    sock = creation[SOCK]()
    if sock is None:
        # The collector may be about to finalize it.
        return socket_inode_of(fd) is not None
    return _fileno(sock) >= 0


def is_made_by(creation: CreationTuple, frame: FrameType | None) -> bool:
    """Whether a call that has not returned yet has just created a socket, or no call is known."""
    stack = creation[STACK]
    return not stack or (frame is not None and stack[:2] == [frame.f_code, frame.f_lasti])


def closed_among(creations: dict[int, CreationTuple]) -> list[int]:
    """The descriptors of those whose sockets are closed, or gone."""
    try:
        return _closed_by(_is_closed, creations)
    except TypeError:  # Some are of a library's own class: then it takes longer.
        return _closed_by(was_closed, creations)


def _closed_by(is_closed: Callable[[Any], bool], creations: dict[int, CreationTuple]) -> list[int]:
    return [
        fd
        for fd, creation in creations.items()
        if (sock := creation[SOCK]()) is None or is_closed(sock)
    ]


def was_closed(sock: _socket.socket) -> bool:
    """Whether `close()` was called; where that is not known, whether the descriptor is gone."""
    return _is_closed(sock) if is_a(sock, SOCKET) else _fileno(sock) < 0


def count_files(sock: _socket.socket) -> int:
    """How many file objects keep the descriptor of a socket, as far as is known."""
    return _file_objects(sock) if is_a(sock, SOCKET) else 0


def as_parent(creation: CreationTuple) -> CreationTuple:
    """What a new creation keeps as its parent: this one, or the root of a line grown too long."""
    if creation[PARENT] is None:
        return creation
    line = [creation]
    while (parent := line[-1][PARENT]) is not None:
        line.append(parent)
    return creation if len(line) <= _MAX_ANCESTORS else line[-1]


def with_serial(creation: CreationTuple, serial: int) -> CreationTuple:
    """With another number, as what is no socket has one in their series."""
    return (*creation[:SERIAL], serial, *creation[SERIAL + 1 :])


def pop_if_same(table: dict[int, Any], key: int, value: object) -> None:
    """Remove an entry unless it has been replaced: another thread may add one at this moment.

    Looked up, compared and removed within one call into C: threads are switched between calls only.
    """
    is_the_same = map(is_, map(table.get, (key,)), (value,))
    deque(map(table.pop, compress((key,), is_the_same)), 0)


class Creation(NamedTuple):
    """How a socket was created. Outlives the socket, and never keeps it alive."""

    sock: Callable[[], socket.socket | None]
    # The address identifies a socket whose weak references the collector has already cleared.
    object_id: int
    serial: int
    pid: int
    opened_at: float | None
    thread: str
    task: str | None
    labels: tuple[object, ...]
    context: dict[str, Scalar]
    origin: Origin
    parent: CreationTuple | None
    stack: CapturedStack


def untracked_sockets(
    creations: dict[int, CreationTuple], others: Iterable[type]
) -> Iterator[tuple[int, socket.socket]]:
    """The open sockets whose creation is not known, by descriptor.

    The creation of the socket that had the descriptor before is removed.

    Args:
        creations: Those that are known.
        others: Socket classes of libraries, which may not be patched.
    """
    classes = [kind for cls in (*patch.patched_classes(), *others) for kind in kinds_of(cls)]
    for reference in weak_instances_of(classes):
        fd = _fd_of(reference)
        known = creations.get(fd)
        if fd < 0 or (known is not None and still_owns(known, fd)):
            continue
        if known is not None:
            pop_if_same(creations, fd, known)
        if (sock := reference()) is not None:
            yield fd, sock


def _fd_of(reference: weakref.ref[socket.socket]) -> int:
    try:
        return _fileno(reference())  # type: ignore[arg-type]
    except Exception:
        # It is gone, or not initialized: made by __new__ alone.
        return -1


class OpenSockets:
    """One moment's open sockets, by descriptor."""

    __slots__ = ("close_called", "creations", "detached")

    def __init__(
        self, creations: dict[int, CreationTuple], close_called: set[int], detached: set[int]
    ) -> None:
        self.creations, self.close_called = creations, close_called
        self.detached = detached

    def opened_after(self, mark: int) -> set[int]:
        """Those that were opened after a mark."""
        return {fd for fd, creation in self.creations.items() if creation[SERIAL] > mark}


# Which function of the standard library makes a socket of a descriptor, and which of its local
# variables has the socket or descriptor that goes before. By the identity of the code, because a
# code object hashes its constants.
_STDLIB_CONSTRUCTORS: dict[int, tuple[Origin, str | None]] = {
    id(code_of(function)): origin_and_name
    for function, origin_and_name in (
        (SOCKET.accept, (Origin.ACCEPTED, "self")),
        (SOCKET.dup, (Origin.DUPLICATED, "self")),
        (socket.fromfd, (Origin.DUPLICATED, "fd")),
        (socket.socketpair, (Origin.CREATED, None)),
    )
}

# The same of libraries that have a class of their own, by `module:name` of the function.
library_constructors: dict[str, tuple[Origin, str]] = {}

_ACCEPTED = Origin.ACCEPTED
_c_socket = _socket.socket
_get_ident = threading.get_ident


# How many of those that were open at a fork, and are closed by now, are remembered between two
# scans; of more, so many are forgotten at once.
_MAX_CLOSED_SINCE_FORK, _FORGOTTEN_AT_ONCE = 10_000, 1000


class ForkedSocket(NamedTuple):
    """A socket that was open at a fork.

    Attributes:
        fd: Its descriptor, which is that of the copy too.
        tcp_info: Linux's `struct tcp_info` at the fork; empty where there is none.
    """

    fd: int
    inode: int | None
    creation: CreationTuple
    tcp_info: bytes


class SocketsAtFork:
    """What was open when this process forked: to close it here leaves a copy in the child open.

    Args:
        creations: The table of those that are open.

    Attributes:
        forgotten: How many of those that were closed since are remembered no more.
    """

    def __init__(self, creations: dict[int, CreationTuple]) -> None:
        self._creations = creations
        self._noted: dict[int, ForkedSocket] = {}  # By serial.
        self._last_serial = -math.inf
        self.forgotten = 0

    def note(self) -> None:
        """In the parent: the child has a copy of all that is open.

        Each socket is looked at once, at the first fork: what a server closes right after a fork
        has no inode later.
        """
        noted, creations = self._noted, self._creations.copy()
        for fd, creation in creations.items():
            serial, sock = creation[SERIAL], creation[SOCK]()
            if serial not in noted and sock is not None and still_owns(creation, fd):
                noted[serial] = ForkedSocket(fd, inode_of(fd), creation, tcp_info_of(sock))
                self._last_serial = max(self._last_serial, serial)
        if len(noted) > len(creations) + _MAX_CLOSED_SINCE_FORK:
            oldest = set(list(self.closed())[:_FORGOTTEN_AT_ONCE])
            self.forgotten += len(oldest)
            self.forget(oldest)

    def closed(self) -> dict[int, ForkedSocket]:
        """By inode, what children may have copies of and this process has not any more."""
        return {
            each.inode: each
            for each in self._noted.copy().values()
            if each.inode is not None
            and not still_owns(each.creation, each.fd)
            and inode_of(each.fd) != each.inode
        }

    def copied_after(self, since: float) -> dict[int, ForkedSocket]:
        """The same of those opened after a mark; none where this process has no child."""
        if self._last_serial <= since:
            return {}
        closed = self.closed()
        if closed and not _has_children():
            self.forget(closed.keys())
            return {}
        return {inode: each for inode, each in closed.items() if each.creation[SERIAL] > since}

    def forget(self, inodes: Set[int]) -> None:
        """No child has these any more."""
        for serial, each in self._noted.copy().items():
            if each.inode in inodes:
                self._noted.pop(serial, None)


def _has_children() -> bool:
    """Whether this process has any, which may have ended; where that does not show, it may."""
    try:
        return bool(descendants_of(os.getpid(), 1))
    except OSError:
        return True


def origin_of(
    fd: int,
    caller: FrameType,
    creations: Mapping[int, CreationTuple],
    detached: Mapping[int, tuple[CreationTuple, int]],
) -> tuple[Origin, CreationTuple | None]:
    """The origin of a socket made of a descriptor, and the creation that goes before.

    Args:
        fd: The descriptor.
        caller: The frame that made the socket.
        creations: The creations by descriptor, before this one.
        detached: The creations and inodes of descriptors that left their socket objects.
    """
    constructor = _STDLIB_CONSTRUCTORS.get(id(caller.f_code))
    if constructor is None:
        caller = _skip_init(caller)
        constructor = _STDLIB_CONSTRUCTORS.get(id(caller.f_code))
    if constructor is not None:
        origin, name = constructor
        if (
            origin is _ACCEPTED
            and (listener := listener_in_accept_by_thread.get(_get_ident())) is not None
        ):
            creation = creations.get(_fileno(listener))
            if creation is None or creation[SOCK]() is not listener:
                return origin, None
            return origin, creation if creation[PARENT] is None else as_parent(creation)
        return origin, _creation_in_variable(caller, name, creations) if name else None
    creation = creations.get(fd)
    if creation is not None:
        if still_owns(creation, fd):
            return Origin.WRAPPED, as_parent(creation)
        left = detached.get(fd)
        if left is not None and left[0] is creation and left[1] == inode_of(fd):
            return Origin.DETACHED, as_parent(creation)
    return _origin_in_library(caller, creations)


def _origin_in_library(
    caller: FrameType, creations: Mapping[int, CreationTuple]
) -> tuple[Origin, CreationTuple | None]:
    """The origin of a socket that a library's own class makes of a descriptor."""
    module = text_of(value_at(caller.f_globals, "__name__"))
    constructor = library_constructors.get(f"{module}:{caller.f_code.co_qualname}")
    if constructor is None:
        return Origin.ADOPTED, None
    origin, name = constructor
    return origin, _creation_in_variable(caller, name, creations)


def _skip_init(frame: FrameType) -> FrameType:
    """Past the constructors of subclasses, to what called them."""
    while frame.f_code.co_name == "__init__" and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _creation_in_variable(
    caller: FrameType, name: str, creations: Mapping[int, CreationTuple]
) -> CreationTuple | None:
    """The creation of the socket, or descriptor, that a local variable of the caller holds."""
    value = variable_of(caller, name)
    # A library's own class may have the object in C as an attribute.
    value = value if is_a(value, _c_socket) else field(value, INNER_SOCKET, value)
    fd = _c_socket.fileno(value) if is_a(value, _c_socket) else value
    if not is_a(fd, int):
        return None
    creation = creations.get(fd)
    return as_parent(creation) if creation is not None and still_owns(creation, fd) else None
