"""From the answers of the kernel to an observation: since when a socket is suspect, who reads it.

The kernel dates a peer's FIN. For everything else the guard's own earlier scans are what is known,
and any sign of life, such as unread data going down, starts the clock again.
"""

from __future__ import annotations

import _socket
import socket
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

from closewait_guard._inspect.probe import Endpoint, ProbeResult
from closewait_guard._live import field, is_a, running_frames, variable_of
from closewait_guard.model import Connection, Observation, SocketRecord

__all__ = [
    "SiteCount",
    "SuspectAge",
    "fds_being_read",
    "notice",
    "observed",
    "peer_closed_for",
    "suspect_for",
]


def observed(
    record: SocketRecord,
    fd: int,
    endpoint: Endpoint,
    view: ProbeResult,
    closed_for: float | None = None,
    suspicious_for: float | None = None,
    *,
    close_called: bool = False,
    in_use: bool = False,
) -> Observation:
    """Put together what the stages before have found out.

    Args:
        record: What is known of its birth.
        fd: Its number.
        endpoint: What does not change about it.
        view: What the look showed.
        closed_for: Seconds since its peer closed.
        suspicious_for: Seconds for which nobody has done anything about it.
        close_called: Whether the program has called `close()`.
        in_use: Whether a thread reads from its file object at this moment.
    """
    # By position and in order: naming nineteen arguments takes as long as storing them.
    return Observation(
        record,
        fd,
        endpoint.inode,
        endpoint.family,
        endpoint.type,
        endpoint.local,
        endpoint.peer,
        view.state,
        view.evidence,
        closed_for,
        view.unread,
        view.last_sent_for,
        view.last_received_for,
        endpoint.tls,
        close_called,
        view.connection,
        suspicious_for,
        view.unsent,
        in_use,
    )


class SuspectAge(NamedTuple):
    """What to remember of a suspect. Times are those of `_clock.now`.

    Attributes:
        seen_at: When the latest look was over.
        ended: What kind of end this is the sighting of.
        first_seen: When a look showed it for the first time.
        since: When it began, as far as the kernel and the earlier looks tell.
        quiet_since: When the program last did anything about it.
    """

    seen_at: float
    ended: tuple[Connection, bool]
    first_seen: float
    since: float
    quiet_since: float
    unread: int | None


def notice(
    view: ProbeResult, close_called: bool, before: SuspectAge | None, at_most: float, now: float
) -> SuspectAge:
    """Take in one look.

    Args:
        view: What the look showed.
        close_called: Whether the program has called `close()`.
        before: The sighting of the look before, if the socket was a suspect then.
        at_most: For how long it can have been like this, for all that is known, if it was not.
        now: When this look was over.
    """
    ended = (view.connection, close_called)
    dated = None if view.fin_for is None else now - view.fin_for
    if before is None or before.ended != ended:
        began = dated if dated is not None else now - (at_most if before is None else 0.0)
        return SuspectAge(now, ended, now, began, began, view.unread)
    return SuspectAge(
        now,
        before.ended,
        before.first_seen,
        # Our own sending makes the peer's last word look younger than its FIN.
        before.since if dated is None else min(before.since, dated),
        before.quiet_since if view.unread == before.unread else now,
        view.unread,
    )


def peer_closed_for(view: ProbeResult, sighting: SuspectAge, now: float) -> float | None:
    """Seconds since the peer's FIN by the kernel, or since the first look that saw its end.

    Args:
        view: What the look showed.
        sighting: What is remembered of it.
        now: When the look began: between that and its end, other threads may have had their turn,
            and an age must not be more than the kernel would say.
    """
    if view.connection is not Connection.PEER_CLOSED:
        return None
    if view.fin_for is not None:
        return now - sighting.since if now > sighting.since else 0.0
    return now - sighting.first_seen if sighting.first_seen < now else None


def suspect_for(view: ProbeResult, sighting: SuspectAge, now: float) -> float | None:
    """For how long nothing has been done about an ended connection; None while it is live.

    As for `peer_closed_for`, `now` is when the look began.
    """
    connection, close_called = sighting.ended
    if connection is Connection.NOT_APPLICABLE or (
        connection is Connection.LIVE and not close_called
    ):
        return None
    last = max(sighting.since, sighting.quiet_since)
    quiet = now - last if now > last else 0.0
    if connection is not Connection.LIVE:
        return quiet
    # A closed socket that still carries data is in use through its file object.
    traffic = (view.last_sent_for, view.last_received_for)
    return min([quiet, *(seconds for seconds in traffic if seconds is not None)])


# SocketIO calls the socket, which calls the TLS layer: what blocks is a few calls in.
_DEEPEST = 12


def fds_being_read() -> set[int]:
    """Descriptors of closed sockets that are nevertheless in use: `makefile()` was called before.

    A thread that waits for the next line of a quiet stream looks like an abandoned one to the
    kernel; its own stack tells the difference.
    """
    frames = running_frames().values()
    return {fd for frame in frames for fd in _used_by(frame)}


def _used_by(frame: FrameType | None) -> Iterator[int]:
    for _ in range(_DEEPEST):
        if frame is None:
            return
        code = frame.f_code
        if code.co_name in ("readinto", "write") and code.co_filename == socket.__file__:
            sock = field(variable_of(frame, "self"), "_sock")
            if is_a(sock, _socket.socket):
                yield _socket.socket.fileno(sock)
        frame = frame.f_back


class SiteCount(NamedTuple):
    """The open sockets of one site, and those of them that are older than a mark."""

    open: int
    old: int
