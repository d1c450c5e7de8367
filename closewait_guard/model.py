"""The values that travel from a socket's creation to a report: frozen, picklable, comparable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from closewait_guard._enums import (
    AlertKind,
    AlertStatus,
    Connection,
    Evidence,
    FrameKind,
    Origin,
    Scalar,
    Severity,
    State,
    Verdict,
)

__all__ = [
    "UNKNOWN_FAMILY",
    "Alert",
    "AlertKind",
    "AlertStatus",
    "ClosedLate",
    "Connection",
    "Coverage",
    "Evidence",
    "Finding",
    "Frame",
    "FrameKind",
    "Observation",
    "Origin",
    "Report",
    "Reporter",
    "Scalar",
    "Severity",
    "SiteGroup",
    "SocketRecord",
    "State",
    "Verdict",
]


@dataclass(frozen=True, slots=True)
class Frame:
    """One call of a creation stack, with the source line where it could be read."""

    filename: str
    lineno: int
    function: str
    module: str
    kind: FrameKind = FrameKind.USER
    source: str | None = None

    @property
    def place(self) -> str:
        """The file and the line."""
        return f"{self.filename}:{self.lineno}"

    @property
    def call(self) -> str:
        """The place, and the function that stands there."""
        return f"{self.place} in {self.function}()".replace(">()", ">")


@dataclass(frozen=True, slots=True)
class SocketRecord:
    """How a socket was opened.

    Attributes:
        serial: Counts the sockets of one guard.
        opened_at: Seconds since the epoch; None for a socket older than the guard.
        context: What `Settings.context` returned then; read it, do not change it.
        parent: The record this descriptor had before (TLS, dup, detach, fork), or the listener's.
        stack: The innermost call first; empty with depth 0 and for adopted sockets.
    """

    serial: int
    pid: int
    opened_at: float | None
    thread: str
    task: str | None
    labels: tuple[str, ...]
    context: Mapping[str, Scalar]
    origin: Origin
    parent: SocketRecord | None
    stack: tuple[Frame, ...]

    @property
    def opener(self) -> SocketRecord:
        """The record of the call that opened the descriptor: through TLS and fork."""
        record = self
        while record.origin in _SAME_DESCRIPTOR and record.parent and record.parent.stack:
            record = record.parent
        return record

    @property
    def blamed(self) -> SocketRecord:
        """The record whose code is to blame: the opener's, or the listener's.

        A server of a library, or an event loop, accepts for the program: no line of the program
        called `accept()`, so the line that opened the listener says more.
        """
        opener = self.opener
        if opener.origin is Origin.ACCEPTED and opener.parent and not _called_by_user(opener.stack):
            return opener.parent.blamed if opener.parent.stack else opener
        return opener

    @property
    def site(self) -> Frame | None:
        """The line to look at: the innermost user frame, else the innermost outside the stdlib."""
        for kind in (FrameKind.USER, FrameKind.LIBRARY):
            for frame in self.blamed.stack:
                if frame.kind is kind:
                    return frame
        return None


_SAME_DESCRIPTOR = frozenset({Origin.WRAPPED, Origin.DETACHED, Origin.INHERITED})


def _called_by_user(stack: tuple[Frame, ...]) -> bool:
    """Whether the program itself called the standard library's socket code."""
    callers = (frame.kind for frame in stack if frame.module not in ("socket", "ssl"))
    return next(callers, None) is FrameKind.USER


# Of a socket that could not be looked at.
UNKNOWN_FAMILY = "unknown"


@dataclass(frozen=True, slots=True)
class Observation:
    """What one look at the kernel showed of one socket.

    Attributes:
        peer_closed_for: Seconds since the peer's FIN; None when it has not closed, or nobody knows.
        unread: Bytes that wait to be read; None where the platform does not say.
        close_called: The program called `close()`, yet a file object keeps the descriptor.
        connection: What is left of the connection.
        suspect_for: For how long the connection has been ended, or `close()` been called, without
            any sign of life; None while nothing is wrong.
        unsent: Bytes or segments that the peer has not acknowledged yet.
        in_use: A thread is reading from the file object of a closed socket at this moment.
    """

    record: SocketRecord
    fd: int
    inode: int | None
    family: str
    type: str
    local: str | None
    peer: str | None
    state: State
    evidence: Evidence
    peer_closed_for: float | None
    unread: int | None
    last_sent_for: float | None
    last_received_for: float | None
    tls: bool
    close_called: bool
    connection: Connection = Connection.LIVE
    suspect_for: float | None = None
    unsent: int | None = None
    in_use: bool = False

    @property
    def ended_for(self) -> float:
        """Seconds since the peer closed, or for which nobody has done anything about it."""
        return max(self.peer_closed_for or 0.0, self.suspect_for or 0.0)

    @property
    def is_described(self) -> bool:
        """Whether looking at it has succeeded; of any other, only where it was opened is known."""
        return self.family != UNKNOWN_FAMILY


try:
    # As `random` does: hashlib loads OpenSSL, and would need a descriptor when a report is made.
    from _sha1 import sha1  # type: ignore[import-not-found]
except ImportError:
    from hashlib import sha1

SCHEMA = "closewait-guard/1"


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict on one socket, and what to do about it.

    Attributes:
        holders: Who keeps it alive, as code that a person would recognise.
        hint: What to change.
        replaced_by: The serial of a younger socket, which the same line has connected to the same
            peer since the connection of this one ended.
        count: How many sockets it stands for: more than one in a saved report that keeps some
            examples of each site.
    """

    observation: Observation
    verdict: Verdict
    severity: Severity
    holders: tuple[str, ...]
    hint: str
    replaced_by: int | None = None
    count: int = 1

    @property
    def is_leak(self) -> bool:
        """Whether the program should have closed this socket."""
        return self.verdict.is_leak

    @property
    def fingerprint(self) -> str:
        """Names verdict and creation stack: the same in every process that runs the same code."""
        record = self.observation.record
        calls = (f"{frame.module}:{frame.lineno}:{frame.function}" for frame in record.opener.stack)
        text = "|".join((self.verdict, record.origin, *calls))
        return str(
            sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()[:12]
        )


@dataclass(frozen=True, slots=True)
class ClosedLate:
    """A leak, as it was last seen, that the program has closed since.

    Attributes:
        after: Seconds for which it was kept open after its connection had ended.
    """

    finding: Finding
    after: float


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that a series of reports shows."""

    kind: AlertKind
    severity: Severity
    message: str
    data: Mapping[str, Scalar]
    status: AlertStatus = AlertStatus.RAISED


@dataclass(frozen=True, slots=True)
class Coverage:
    """What the guard has seen, and what it could not.

    Attributes:
        opened: Sockets opened since the guard was installed; in a forked child, since the fork.
        adopted: Open sockets that are older than the guard, so that nobody knows who opened them.
        dropped: Sockets garbage-collected while open, in the same time.
        forgotten: Those of the dropped whose records had to make room for younger ones.
        failures: Creations or ends that the guard failed to record.
        native: Open sockets that no socket object is known for, because native code opened them or
            they came as a number; None where nobody says. A count of one moment: a socket that
            another thread is in the middle of opening or closing has no object either, and counts.
        notes: One sentence for each thing the guard cannot see here.
    """

    opened: int
    adopted: int
    dropped: int
    forgotten: int
    failures: int
    notes: tuple[str, ...]
    native: int | None = None


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Leaks with one verdict and one creation stack."""

    verdict: Verdict
    severity: Severity
    site: Frame | None
    findings: tuple[Finding, ...]

    @property
    def count(self) -> int:
        """How many leaks there are, also where only some of them have been saved."""
        return sum(leak.count for leak in self.findings)

    @property
    def fingerprint(self) -> str:
        """That of each of the leaks."""
        return self.findings[0].fingerprint


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one scan found.

    Attributes:
        taken_at: Seconds since the epoch.
        open_sockets: Open sockets that the guard tracks.
        fd_used: Descriptors that the process has open, of any kind; None where nobody knows.
        fd_limit: The soft limit on descriptors; None when there is none.
        findings: Suspects: leaks, and what is explained. A healthy socket is not among them.
        alerts: What a series of reports shows, when it begins, gets worse and ends; in a scan,
            which is no part of a series, the thresholds that are crossed at this moment.
        observations: The healthy sockets, of a full scan only.
        closed_late: Leaks of the report before that have been closed since; none in a scan.
        omitted: Leaks that were left out, because they were reported before or matter less.
    """

    schema: str
    taken_at: float
    host: str
    pid: int
    command: str
    python: str
    open_sockets: int
    fd_used: int | None
    fd_limit: int | None
    coverage: Coverage
    findings: tuple[Finding, ...]
    alerts: tuple[Alert, ...] = ()
    observations: tuple[Observation, ...] = ()
    closed_late: tuple[ClosedLate, ...] = ()
    omitted: int = 0

    @property
    def leaks(self) -> tuple[Finding, ...]:
        """The findings that the program is to blame for."""
        return tuple(finding for finding in self.findings if finding.is_leak)

    def by_site(self) -> tuple[SiteGroup, ...]:
        """Group the leaks by verdict and creation stack, worst first."""
        groups: dict[object, list[Finding]] = {}
        for leak in self.findings:
            groups.setdefault(site_key(leak), []).append(leak)
        return tuple(sorted((_group(leaks) for leaks in groups.values()), key=_badness))


def site_key(leak: Finding) -> object:
    """What leaks of one group have in common."""
    record = leak.observation.record
    return leak.verdict, record.origin, record.opener.stack, record.site


def _group(leaks: list[Finding]) -> SiteGroup:
    return SiteGroup(
        verdict=leaks[0].verdict,
        severity=max((leak.severity for leak in leaks), key=lambda severity: severity.rank),
        site=leaks[0].observation.record.site,
        findings=tuple(leaks),
    )


def _badness(group: SiteGroup) -> tuple[bool, int, int, int]:
    return (not group.verdict.is_leak, -group.severity.rank, -group.count, group.verdict.rank)


class Reporter(Protocol):
    """Whatever can be called with a report: a function, a bound method, an object."""

    def __call__(self, report: Report, /) -> object:
        """Tell of the report; raise nothing that the program should see."""


def reporter_name(reporter: object) -> str:
    """What to call a reporter in a sentence."""
    name = getattr(reporter, "__qualname__", None)
    if isinstance(name, str):
        return name
    has_own_text = type(reporter).__repr__ is not object.__repr__
    return repr(reporter) if has_own_text else type(reporter).__qualname__


def close_reporter(reporter: object) -> None:
    """Let a reporter give back what it holds, if it holds anything."""
    close = getattr(reporter, "close", None)
    if callable(close):
        close()
