"""What is remembered of a socket until somebody asks: a plain tuple, and its names."""

from __future__ import annotations

import _socket
import socket
import weakref
from typing import Any, NamedTuple

from closewait_guard._stack import NO_STACK, Stack
from closewait_guard._vocabulary import Origin, Scalar

__all__ = [
    "KEY",
    "NO_CONTEXT",
    "ORIGIN",
    "PARENT",
    "SERIAL",
    "SOCK",
    "STACK",
    "Birth",
    "Story",
    "descended_from",
    "discard",
    "holds",
    "stranger",
]

# The fields of a Birth in their order: making a named tuple would take three times as long.
Story = tuple[Any, ...]

# Bounds what `sock = sock.dup()` in a loop can pile up; the root of the line is always kept.
_MOST_ANCESTORS = 16

NO_CONTEXT: dict[str, Scalar] = {}

_fileno = _socket.socket.fileno


class Birth(NamedTuple):
    """A story with names. Outlives its socket, never holds it."""

    sock: weakref.ref[socket.socket]
    # The address tells a socket whose weak references the collector has already cleared.
    key: int
    serial: int
    pid: int
    born_at: float | None
    thread: str
    task: str | None
    labels: tuple[str, ...]
    context: dict[str, Scalar]
    origin: Origin
    parent: Story | None
    stack: Stack


SOCK, KEY, SERIAL, ORIGIN, PARENT, STACK = (
    Birth._fields.index(name) for name in ("sock", "key", "serial", "origin", "parent", "stack")
)


def stranger(sock: socket.socket, serial: int, pid: int) -> Story:
    """The story of a socket that nobody has seen born."""
    birth = Birth(
        sock=weakref.ref(sock),
        key=id(sock),
        serial=serial,
        pid=pid,
        born_at=None,
        thread="",
        task=None,
        labels=(),
        context=NO_CONTEXT,
        origin=Origin.ADOPTED,
        parent=None,
        stack=NO_STACK,
    )
    return tuple(birth)


def holds(story: Story, fd: int) -> bool:
    """Whether the socket of a story is alive and this its descriptor."""
    sock = story[SOCK]()
    return sock is not None and _fileno(sock) == fd


def descended_from(story: Story) -> Story:
    """What a new birth keeps as its parent: the story, or the root of a line grown too long."""
    if story[PARENT] is None:
        return story
    line = [story]
    while (parent := line[-1][PARENT]) is not None:
        line.append(parent)
    return story if len(line) <= _MOST_ANCESTORS else line[-1]


def discard(table: dict[int, Any], key: int, value: object) -> None:
    """Remove an entry unless it has been replaced: another thread may register this moment."""
    found = table.pop(key, None)
    if found is not None and found is not value:
        table.setdefault(key, found)
