"""The record of how a socket was created: a plain tuple, and the same with named fields."""

from __future__ import annotations

import _socket
import socket
import weakref
from collections import deque
from itertools import compress
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

from closewait_guard._capture.stack import NO_STACK, CapturedStack
from closewait_guard._enums import Origin, Scalar

if TYPE_CHECKING:
    from closewait_guard._enums import Scalar

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
    "as_parent",
    "pop_if_same",
    "still_owns",
    "unknown_creation",
]


# Making a named tuple would take three times as long.
CreationTuple = tuple[Any, ...]
SOCK, OBJECT_ID, SERIAL, PID, ORIGIN, PARENT, STACK = 0, 1, 2, 3, 9, 10, 11

# Bounds what `sock = sock.dup()` in a loop can pile up; the root of the line is always kept.
_MAX_ANCESTORS = 16

NO_CONTEXT: dict[str, Scalar] = {}

_fileno = _socket.socket.fileno


def unknown_creation(sock: socket.socket, serial: int, pid: int) -> CreationTuple:
    """The creation of a socket that was opened before it could be recorded."""
    when, thread, task, labels, parent = None, "", None, (), None
    return (
        weakref.ref(sock),
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


def as_parent(creation: CreationTuple) -> CreationTuple:
    """What a new creation keeps as its parent: this one, or the root of a line grown too long."""
    if creation[PARENT] is None:
        return creation
    line = [creation]
    while (parent := line[-1][PARENT]) is not None:
        line.append(parent)
    return creation if len(line) <= _MAX_ANCESTORS else line[-1]


def pop_if_same(table: dict[int, Any], key: int, value: object) -> None:
    """Remove an entry unless it has been replaced: another thread may add one at this moment.

    Looked up, compared and removed within one call into C: threads are switched between calls only.
    """
    is_the_same = map(is_, map(table.get, (key,)), (value,))
    deque(map(table.pop, compress((key,), is_the_same)), 0)


class Creation(NamedTuple):
    """How a socket was created. Outlives the socket, and never keeps it alive."""

    sock: weakref.ref[socket.socket]
    # The address identifies a socket whose weak references the collector has already cleared.
    object_id: int
    serial: int
    pid: int
    opened_at: float | None
    thread: str
    task: str | None
    labels: tuple[str, ...]
    context: dict[str, Scalar]
    origin: Origin
    parent: CreationTuple | None
    stack: CapturedStack
