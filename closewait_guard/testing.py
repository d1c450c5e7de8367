"""Helpers for tests of programs that use the guard: real half-closed sockets, a reporter."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from closewait_guard.model import Report

__all__ = [
    "CapturingReporter",
    "connected_pair",
    "half_closed_pair",
]


@contextmanager
def connected_pair(host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection over loopback: our end and the peer's. Both are closed afterwards."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        ours = socket.create_connection(server.getsockname()[:2])
        theirs, _ = server.accept()
    with ours, theirs:
        yield ours, theirs


@contextmanager
def half_closed_pair(unread: bytes = b"") -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection whose peer has closed, after sending `unread`: ours is in CLOSE_WAIT.

    Example:
        >>> with half_closed_pair(b"rest") as (ours, theirs):
        ...     ours.recv(10), ours.recv(10)
        (b'rest', b'')
    """
    with connected_pair() as (ours, theirs):
        theirs.sendall(unread)
        theirs.close()
        # The FIN is under way: wait for it, so that a scan sees it for certain.
        select.select([ours], [], [], 5)
        yield ours, theirs


class CapturingReporter:
    """A reporter that keeps the reports it is given.

    Example:
        >>> reporter = CapturingReporter()
        >>> from closewait_guard import Guard
        >>> with Guard(reporters=[reporter]) as guard:
        ...     reporter.reports == [guard.report()]
        True
    """

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def __call__(self, report: Report) -> None:
        self.reports.append(report)
