"""From the answers of the kernel to an observation: since when a socket is suspect, who reads it.

The kernel dates a peer's FIN. For everything else the guard's own earlier scans are what is known,
and any sign of life, such as unread data going down, starts the clock again.
"""

from __future__ import annotations

import _socket
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple

from closewait_guard._cpython import FILE_SOCKET
from closewait_guard._inspect.probe import Endpoint, ProbeResult
from closewait_guard._live import field, is_a, running_frames, variable_of
from closewait_guard.model import Connection, Observation, SocketRecord, State, Unanswered

__all__ = [
    "ScanResult",
    "SeenOwner",
    "SiteCount",
    "SuspectAge",
    "fds_being_read",
    "is_unused_since",
    "longest_possible",
    "make_observation",
    "peer_closed_for",
    "suspect_for",
    "update_age",
]


def make_observation(
    record: SocketRecord,
    fd: int,
    endpoint: Endpoint,
    result: ProbeResult,
    closed_for: float | None = None,
    suspicious_for: float | None = None,
    *,
    close_called: bool = False,
    in_use: bool = False,
    is_lower_bound: bool = False,
    unanswered: Unanswered | None = None,
) -> Observation:
    """Put together what the stages before have found out.

    Args:
        record: What is known of its creation.
        fd: Its number.
        endpoint: What does not change about it.
        result: What the probe showed.
        closed_for: Seconds since its peer closed.
        suspicious_for: Seconds for which the program has not done anything about it.
        close_called: Whether the program has called `close()`.
        in_use: Whether a thread reads from its file object at this moment.
        is_lower_bound: Whether its peer may have closed earlier.
        unanswered: What the peer does not acknowledge.
    """
    family, kind, local, peer, inode, tls = endpoint
    state, evidence, connection, _, unread, unsent, sent_for, received_for, _ = result
    # By position and in order: naming so many arguments takes as long as storing them.
    return Observation(
        record,
        fd,
        inode,
        family,
        kind,
        local,
        peer,
        state,
        evidence,
        closed_for,
        unread,
        sent_for,
        received_for,
        tls,
        close_called,
        connection,
        suspicious_for,
        unsent,
        in_use,
        is_lower_bound,
        None,
        None,
        unanswered,
    )


class SuspectAge(NamedTuple):
    """What to remember of a suspect. Times are those of `_clock.now`.

    It stays the same object as long as nothing happens to the suspect.

    Attributes:
        seen_at: When the probe was over that showed the latest change.
        ended: What kind of end it is.
        first_seen: When a probe showed it for the first time.
        since: When it began at the latest, as far as the kernel and the earlier scans show.
        quiet_since: When the program last did anything about it, or when it began at the earliest.
        unread: How many bytes the program had left to read.
        has_read: Whether the program has read between two scans.
        is_bound: It may have begun before `since`.
    """

    seen_at: float
    ended: tuple[Connection, bool]
    first_seen: float
    since: float
    quiet_since: float
    unread: int | None
    has_read: bool = False
    is_bound: bool = False


def update_age(
    result: ProbeResult, close_called: bool, before: SuspectAge | None, at_most: float, now: float
) -> SuspectAge:
    """The age after one more probe.

    Args:
        result: What the probe showed.
        close_called: Whether the program has called `close()`.
        before: The age at the scan before, if the socket was a suspect then.
        at_most: For how long it can have been like this, for all that is known, if it was not.
        now: When this probe was over.
    """
    ended = (result.connection, close_called)
    dated = None if result.fin_for is None else now - result.fin_for
    unread = result.unread
    if before is None or before.ended != ended:
        earliest = now - (at_most if before is None else 0.0)
        # A bound excuses nothing: until a later scan, it counts as old as it can be.
        is_bound = dated is None or result.is_fin_bound
        since = earliest if dated is None else dated
        quiet_since = min(since, earliest) if is_bound else since
        has_read = _has_read(unread, before)
        return SuspectAge(now, ended, now, since, quiet_since, unread, has_read, is_bound)
    # Our own sending makes the peer's last word look younger than its FIN.
    since = before.since if dated is None else min(before.since, dated)
    is_quiet = unread == before.unread
    # Within the kernel's precision nothing has changed: most dates are a little apart.
    if is_quiet and before.since - since < _PRECISION:
        return before
    return before._replace(
        seen_at=now,
        since=since,
        quiet_since=before.quiet_since if is_quiet else now,
        unread=unread,
        has_read=_has_read(unread, before),
    )


def _has_read(unread: int | None, before: SuspectAge | None) -> bool:
    if before is None or before.has_read:
        return before is not None
    return unread is not None and before.unread is not None and unread < before.unread


def longest_possible(
    result: ProbeResult, was_scanned: bool, scanned_for: float, opened_for: float | None
) -> float:
    """For how long a connection can have been ended that no scan has seen so before.

    Args:
        result: What the probe showed.
        was_scanned: Whether the scan before covered it.
        scanned_for: Seconds since that scan.
        opened_for: Seconds since it was opened; None if that is unknown.
    """
    if was_scanned and not result.is_fin_bound:
        return 0.0
    is_covered = was_scanned or opened_for is not None
    bounds = (result.last_sent_for, result.last_received_for, opened_for)
    known = [bound for bound in bounds if bound is not None]
    return max(0.0, min([*known, scanned_for] if is_covered else known, default=0.0))


def peer_closed_for(result: ProbeResult, age: SuspectAge, now: float) -> float | None:
    """Seconds since the peer's FIN by the kernel, or since the first scan that saw its end.

    Args:
        result: What the probe showed.
        age: What is remembered of it.
        now: When the probe began: between that and its end, other threads may have had their turn,
            and an age must not be more than the kernel would say.
    """
    if result.connection is not Connection.PEER_CLOSED:
        return None
    if result.fin_for is not None:
        return now - age.since if now > age.since else 0.0
    return now - age.first_seen if age.first_seen < now else None


def suspect_for(
    result: ProbeResult, age: SuspectAge, now: float, unused_for: float | None = None
) -> float | None:
    """For how long nothing has been done about an ended connection; None while it is live.

    As for `peer_closed_for`, `now` is when the probe began. A live one is suspect too where it is
    an unused copy, whose original is closed, for so long at least.
    """
    connection, close_called = age.ended
    quiet = now - age.quiet_since if now > age.quiet_since else 0.0
    if connection in _ENDED:
        return quiet
    if connection is Connection.NOT_APPLICABLE or (not close_called and unused_for is None):
        return None
    # A closed socket that still carries data is in use through its file object.
    traffic = (result.last_sent_for, result.last_received_for)
    return min(
        [max(quiet, unused_for or 0.0), *(seconds for seconds in traffic if seconds is not None)]
    )


_ENDED = frozenset(Connection) - {Connection.LIVE, Connection.NOT_APPLICABLE}
# The kernel counts in ticks of up to 10 ms.
_PRECISION, _TICK = 0.01, 0.02


def is_unused_since(result: ProbeResult, seconds: float) -> bool:
    """Whether a connection is up, and this end has not used it for so many seconds.

    As far as the kernel dates it: what has come and waits to be read is no use.
    """
    sent, received = result.last_sent_for, result.last_received_for
    if result.state is not State.ESTABLISHED or sent is None or received is None:
        return False
    limit = seconds + _TICK
    return sent > limit and (received > limit or bool(result.unread))


# SocketIO calls the socket, which calls the TLS layer: what blocks is a few calls in.
_MAX_DEPTH = 12


def fds_being_read() -> set[int]:
    """Descriptors of closed sockets that are nevertheless in use: `makefile()` was called before.

    A thread that waits for the next line of a quiet stream looks like an abandoned one to the
    kernel; its own stack shows the difference.
    """
    frames = running_frames().values()
    return {fd for frame in frames for fd in _fds_read_by(frame)}


def _fds_read_by(frame: FrameType | None) -> Iterator[int]:
    for _ in range(_MAX_DEPTH):
        if frame is None:
            return
        code = frame.f_code
        if code.co_name in ("readinto", "write") and code.co_filename == socket.__file__:
            sock = field(variable_of(frame, "self"), FILE_SOCKET)
            if is_a(sock, _socket.socket):
                yield _socket.socket.fileno(sock)
        frame = frame.f_back


class SiteCount(NamedTuple):
    """The open sockets of one site, and those of them that are older than a mark."""

    open: int
    old: int


class SeenOwner(NamedTuple):
    """An owner that should have been closed.

    Attributes:
        sockets: The serials of its sockets, for whose state it is the cause, as far as recorded.
        fds: The descriptors of all its sockets.
    """

    observation: Observation
    sockets: frozenset[int]
    fds: frozenset[int]

    @property
    def has_any(self) -> bool:
        """Whether it has a descriptor."""
        owner = self.observation.owner
        return owner is not None and bool(owner.sockets or owner.descriptors)

    @property
    def serial(self) -> int:
        """Its own."""
        return self.observation.record.serial


class ScanResult(NamedTuple):
    """What one scan saw; of the undescribed, only the creation is known."""

    open_sockets: int
    suspects: tuple[Observation, ...]
    dropped: tuple[Observation, ...]
    healthy: tuple[Observation, ...]
    undescribed: int = 0

    def only(self, wanted: Callable[[Observation], bool]) -> ScanResult:
        """Without what is not wanted."""
        return self._replace(
            suspects=tuple(filter(wanted, self.suspects)),
            healthy=tuple(filter(wanted, self.healthy)),
        )

    def opened_after(self, mark: int) -> tuple[Observation, ...]:
        """What was opened after a mark, healthy or not."""
        everything = (*self.suspects, *self.dropped, *self.healthy)
        return tuple(each for each in everything if each.record.serial > mark)

    def with_owners(self, owners: list[SeenOwner], explained: frozenset[int]) -> ScanResult:
        """Owners among the dropped, in place of their own sockets; others are left out too."""
        if not owners and not explained:
            return self
        theirs = explained.union(*(each.sockets for each in owners))
        suspects, dropped, healthy = (
            tuple(each for each in seen if each.record.serial not in theirs)
            for seen in (self.suspects, self.dropped, self.healthy)
        )
        dropped += tuple(each.observation for each in owners)
        return self._replace(suspects=suspects, dropped=dropped, healthy=healthy)

    def with_natives(self, natives: ScanResult) -> ScanResult:
        """Both together; the count remains that of tracked sockets."""
        return self._replace(
            suspects=self.suspects + natives.suspects,
            healthy=self.healthy + natives.healthy,
            undescribed=self.undescribed + natives.undescribed,
        )
