"""The values of a report, from Frame and SocketRecord to Report: frozen, picklable, comparable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from closewait_guard._cpython import refuse_changes, sha1, store_by_slot
from closewait_guard._enums import (
    GONE,
    LEAKS,
    AlertKind,
    AlertStatus,
    Connection,
    DescriptorKind,
    Evidence,
    FrameKind,
    Origin,
    Scalar,
    Severity,
    State,
    Verdict,
)
from closewait_guard._record import Frame, OpenAtEnd, SocketOwner, SocketRecord

__all__ = [
    "UNKNOWN_FAMILY",
    "Alert",
    "AlertKind",
    "AlertStatus",
    "Checkout",
    "ClosedLate",
    "Connection",
    "Coverage",
    "DescriptorKind",
    "Descriptors",
    "Evidence",
    "Finding",
    "Frame",
    "FrameKind",
    "FullPool",
    "Observation",
    "OpenAtEnd",
    "Origin",
    "Report",
    "Reporter",
    "Scalar",
    "Severity",
    "SiteGroup",
    "SocketOwner",
    "SocketRecord",
    "State",
    "Unanswered",
    "Verdict",
]

SCHEMA = "closewait-guard/1"
TEST_SCHEMA = "closewait-guard-pytest/1"  # Of a line of the pytest plugin with a report in it.
UNKNOWN_FAMILY = "unknown"  # Of a socket that could not be probed.


@refuse_changes
@dataclass(frozen=True, slots=True)
class Checkout:
    """A connection that was taken from a pool and not given back; its record says where.

    Attributes:
        library: The library of the pool.
        pool: What its users call the pool, and where its connections lead.
        out: How many of its connections are out.
        max_size: How many it hands out at most; None where there is no bound.
        seconds: How long ago it was taken.
    """

    library: str
    pool: str
    out: int
    max_size: int | None
    seconds: float


@refuse_changes
@dataclass(frozen=True, slots=True)
class Unanswered:
    """What was sent on a connection that is up, and the peer's system does not acknowledge.

    Attributes:
        seconds: For how long, at least.
        attempts: How often it was sent again, or a peer without room was asked for some.
        heard_for: Seconds since anything came from the peer, which may be long before it was sent.
    """

    seconds: float
    attempts: int
    heard_for: float


@refuse_changes
@store_by_slot
@dataclass(frozen=True, slots=True)
class Observation:
    """What one probe of the kernel showed of one socket, or what was seen of an owner of sockets.

    Attributes:
        peer_closed_for: Seconds since the peer's FIN; None if it has not closed or that is unknown.
        unread: Bytes that wait to be read; None where the platform does not say.
        close_called: The program called `close()`, but a file object keeps the descriptor open.
        connection: What is left of the connection.
        suspect_for: Seconds since the connection ended, or `close()` was called, without any
            activity since; None while nothing is wrong.
        unsent: Bytes or segments that the peer has not acknowledged yet.
        in_use: The file object of a closed socket is read at this moment, or was between two scans.
        is_lower_bound: The peer closed at least `peer_closed_for` ago, or earlier: the kernel does
            not date the end, or not since the connection has answered keepalive probes.
        owner: The object that was not closed; None for a socket. It has no descriptor itself: the
            number is -1.
        checkout: The pool that it was taken from and not given back to. Then `record` says where it
            was taken, and its parent where the pool has opened it.
        unanswered: What the peer does not acknowledge, though it was sent again; None if it does.
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
    is_lower_bound: bool = False
    owner: SocketOwner | None = None
    checkout: Checkout | None = None
    unanswered: Unanswered | None = None

    @property
    def ended_for(self) -> float:
        """Seconds since the peer closed or was silent, or since the socket became a suspect."""
        if self.is_lower_bound and self.peer_closed_for is not None:
            # What is not known must not make it look worse.
            return self.peer_closed_for
        unanswered = 0.0 if self.unanswered is None else self.unanswered.seconds
        return max(self.peer_closed_for or 0.0, self.suspect_for or 0.0, unanswered)

    @property
    def is_described(self) -> bool:
        """Whether the probe succeeded; of any other socket only the creation is known."""
        return self.family != UNKNOWN_FAMILY


@refuse_changes
@store_by_slot
@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one suspect socket, what keeps it open, and what to change.

    Attributes:
        holders: What keeps it open, as code that the reader recognises.
        hint: What to change.
        replaced_by: The serial of a newer socket that the same line has connected to the same peer.
        code: The stable code of verdict and cause, such as CWG104; empty in an older report.
        package: Whose code opened it: a library, such as `httpx 0.28.1`, or else the `caller`.
        via: The outermost library that the program called for it, if that is another.
        caller: The program's own package that did so, to two levels.
        count: How many sockets it stands for: more than one in a saved report that keeps some
            examples of each site.
        closed_at_exit: It was closed only as the program ended.
    """

    observation: Observation
    verdict: Verdict
    severity: Severity
    holders: tuple[str, ...]
    hint: str
    replaced_by: int | None = None
    code: str = ""
    package: str = ""
    via: str = ""
    caller: str = ""
    count: int = 1
    closed_at_exit: bool = False

    @property
    def is_leak(self) -> bool:
        """Whether the program should have closed this socket."""
        return self.verdict in LEAKS

    @property
    def is_gone(self) -> bool:
        """Whether it was collected or lost its last reference, so that nothing can close it now."""
        return self.observation.evidence in GONE

    @property
    def fingerprint(self) -> str:
        """A hash of verdict and creation stack: the same in every process with the same code."""
        record = self.observation.record
        calls = (f"{frame.module}:{frame.lineno}:{frame.function}" for frame in record.opener.stack)
        text = "|".join((self.verdict, record.origin, *calls))
        digest = sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False)
        return str(digest.hexdigest()[:12])


@refuse_changes
@dataclass(frozen=True, slots=True)
class ClosedLate:
    """A leak that the program has closed since the report before.

    Attributes:
        finding: The leak as it was last seen.
        after: Seconds for which it stayed open after its connection had ended.
    """

    finding: Finding
    after: float


@refuse_changes
@dataclass(frozen=True, slots=True)
class Alert:
    """A limit that is exceeded, or a trend in a series of reports."""

    kind: AlertKind
    severity: Severity
    message: str
    data: Mapping[str, Scalar]
    status: AlertStatus = AlertStatus.RAISED
    code: str = ""


@refuse_changes
@dataclass(frozen=True, slots=True)
class Coverage:
    """What the guard has seen, and what it could not see.

    Attributes:
        opened: Sockets opened since the guard was installed; in a forked child, since the fork.
        adopted: Open sockets that are older than the guard, so that their creation is unknown.
        dropped: Sockets garbage-collected while open, in the same time.
        forgotten: Those of the dropped whose records had to make room for newer ones.
        failures: Creations or ends that the guard failed to record.
        native: Open sockets without a known socket object, as native code opens them; None if that
            is unknown. It includes one that another thread is in the middle of opening or closing.
        attributed: Those of the native whose call is known, by `attribute()`.
        earlier: Those of the native that are older than the guard: inherited, or opened before it.
        notes: One sentence for each thing the guard cannot see here.
        leaks_unknown: Why leaks may be missing from the report: then no gate must pass.
    """

    opened: int
    adopted: int
    dropped: int
    forgotten: int
    failures: int
    notes: tuple[str, ...]
    native: int | None = None
    attributed: int = 0
    earlier: int = 0
    leaks_unknown: tuple[str, ...] = ()


@refuse_changes
@dataclass(frozen=True, slots=True)
class Descriptors:
    """All descriptors that a process has open, sockets or not.

    Attributes:
        total: How many there are: the sum of `by_kind`.
        by_kind: How many of each `DescriptorKind`, the most frequent first.
        names: By kind, what is open most often, with counts: paths, or `FOLDER/*` for several files
            of one folder. Empty unless descriptors run out, or a full scan asks for it.
        counted_for: Seconds since they were counted: very many are not counted at each scan.
        owners: As `names`, by kind, what has most of them, as `30 subprocess.Popen opened at
            run.py:9`, and how many.
    """

    total: int
    by_kind: Mapping[str, int]
    names: Mapping[str, Mapping[str, int]]
    counted_for: float = 0.0
    owners: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@refuse_changes
@dataclass(frozen=True, slots=True)
class FullPool:
    """A pool that has no connection left to hand out.

    Attributes:
        name: What its users call it, and where its connections lead.
        max_size: How many it hands out at most.
        full_for: Seconds since the last of them was taken.
        oldest_for: Seconds since the first of them was taken.
        sites: Where they were taken, and how many at each place, the most first.
    """

    name: str
    max_size: int
    full_for: float
    oldest_for: float
    sites: Mapping[str, int]


@refuse_changes
@dataclass(frozen=True, slots=True)
class SiteGroup:
    """The findings with one verdict and one creation stack."""

    verdict: Verdict
    severity: Severity
    site: Frame | None
    findings: tuple[Finding, ...]

    @property
    def count(self) -> int:
        """How many sockets there are, even if only some of them have been saved."""
        return sum(finding.count for finding in self.findings)

    @property
    def code(self) -> str:
        """The code of the first of its findings whose holders are known, else of the first."""
        return self._example.code

    @property
    def hint(self) -> str:
        """What to change, of the same finding."""
        return self._example.hint

    @property
    def _example(self) -> Finding:
        return next((finding for finding in self.findings if finding.holders), self.findings[0])

    @property
    def fingerprint(self) -> str:
        """The fingerprint that all its findings have."""
        return self.findings[0].fingerprint


@refuse_changes
@dataclass(frozen=True, slots=True)
class Report:
    """Everything one scan found. `str(report)`, and so `print(report)`, is its text.

    Attributes:
        taken_at: Seconds since the epoch.
        open_sockets: Open sockets that the guard tracks.
        fd_used: Descriptors that the process has open, of any kind; None if that is unknown.
        fd_limit: The soft limit on descriptors; None if there is none.
        findings: Suspects: leaks, and those with an explanation; no healthy sockets.
        alerts: In a series of reports, the alerts that begin, get worse or end; in a single scan,
            the thresholds that are exceeded at this moment.
        observations: The healthy sockets, of a full scan only.
        closed_late: Leaks of the report before that have been closed since; none in a scan.
        omitted: Leaks that were left out: reported before, less severe, or too many to remember.
        descriptors: What all descriptors are; None if that is unknown.
        full_pools: The pools that have no connection left to hand out.
        open_at_end: Objects with connections that nothing has closed before the end of the process,
            the most first: no leaks. Only in its last report, under `run` and of `watch()`.
        redacted: Whether texts may have been removed from it, by `Settings.redact`.
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
    descriptors: Descriptors | None = None
    full_pools: tuple[FullPool, ...] = ()
    open_at_end: tuple[OpenAtEnd, ...] = ()
    redacted: bool = False

    def __str__(self) -> str:
        # Loaded with the first scan, so that there need be no descriptor left for it now.
        from closewait_guard._delivery import render_text

        return render_text(self).rstrip("\n")

    @property
    def leaks(self) -> tuple[Finding, ...]:
        """The findings that are leaks: sockets that the program should have closed."""
        return tuple(finding for finding in self.findings if finding.is_leak)

    def by_site(self) -> tuple[SiteGroup, ...]:
        """Group the findings by verdict and creation stack, worst first."""
        groups: dict[object, list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault(site_key(finding), []).append(finding)
        return tuple(sorted((_make_group(findings) for findings in groups.values()), key=_sort_key))


def site_key(finding: Finding) -> object:
    """What the findings of one group have in common."""
    record = finding.observation.record
    return finding.verdict, record.origin, record.opener.stack, record.site


def _make_group(findings: list[Finding]) -> SiteGroup:
    return SiteGroup(
        verdict=findings[0].verdict,
        severity=max((each.severity for each in findings), key=lambda each: each.rank),
        site=findings[0].observation.record.site,
        findings=tuple(findings),
    )


def _sort_key(group: SiteGroup) -> tuple[bool, int, int, int]:
    return (not group.verdict.is_leak, -group.severity.rank, -group.count, group.verdict.rank)


class Reporter(Protocol):
    """Anything that can be called with a report: a function, a bound method, an object."""

    def __call__(self, report: Report, /) -> object:
        """Take a report. What it raises is logged and does not reach the program."""
