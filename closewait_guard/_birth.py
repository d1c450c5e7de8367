"""A story with names, for whoever has the time to make it."""

from __future__ import annotations

import socket
import weakref
from typing import NamedTuple

from closewait_guard._origin import Origin
from closewait_guard._stack import Stack
from closewait_guard._story import Story
from closewait_guard._vocabulary import Scalar

__all__ = ["Birth"]


class Birth(NamedTuple):
    """Outlives its socket, never holds it."""

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
