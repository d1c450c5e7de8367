"""The values that travel from a socket's birth to a report: frozen, picklable, comparable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from closewait_guard._judgements import AlertKind, AlertStatus, Severity, Verdict
from closewait_guard._origin import Origin
from closewait_guard._socket_values import Frame, Observation, SocketRecord
from closewait_guard._vocabulary import Connection, Evidence, FrameKind, Scalar, State

try:
    # As `random` does: hashlib loads OpenSSL, and would need a descriptor when a report is made.
    from _sha1 import sha1  # type: ignore[import-not-found]
except ImportError:
    from hashlib import sha1

__all__ = [
    "Alert",
    "AlertKind",
    "AlertStatus",
    "Closed",
    "Connection",
    "Coverage",
    "Evidence",
    "Frame",
    "FrameKind",
    "Leak",
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

SCHEMA = "closewait-guard/1"


@dataclass(frozen=True, slots=True)
class Leak:
    """A verdict on one socket, and what to do about it.

    Attributes:
        holders: Who keeps it alive, as code that a person would recognise.
        hint: What to change.
        superseded_by: The serial of a younger socket, that the same line has connected to the same
            peer since this one became useless.
        count: How many leaks it stands for: more than one in a saved report that keeps some
            examples of each site.
    """

    observation: Observation
    verdict: Verdict
    severity: Severity
    holders: tuple[str, ...]
    hint: str
    superseded_by: int | None = None
    count: int = 1

    @property
    def accused(self) -> bool:
        """Whether the program should have closed this socket."""
        return self.verdict.accused

    @property
    def fingerprint(self) -> str:
        """Names verdict and creation stack: the same in every process that runs the same code."""
        record = self.observation.record
        calls = (f"{frame.module}:{frame.lineno}:{frame.function}" for frame in record.birth.stack)
        text = "|".join((self.verdict, record.origin, *calls))
        return str(
            sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()[:12]
        )


@dataclass(frozen=True, slots=True)
class Closed:
    """A socket that was accused, as it was last seen, and that the program has closed after all.

    Attributes:
        after: Seconds that it was kept after it had become useless.
    """

    leak: Leak
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
        births: Sockets born since the guard was installed; in a forked child, since the fork.
        adopted: Open sockets that are older than the guard, so that their birth is unknown.
        dropped: Sockets garbage-collected while open, in the same time.
        forgotten: Those of the dropped whose records had to make room for younger ones.
        failures: Births or deaths that the guard failed to record.
        native: Open sockets that no socket object is known for, because native code opened them or
            they came as a number; None where nobody says. A count of one moment: a socket that
            another thread is in the middle of opening or closing has no object either, and counts.
        notes: One sentence for each thing the guard cannot see here.
    """

    births: int
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
    leaks: tuple[Leak, ...]

    @property
    def count(self) -> int:
        """How many leaks there are, also where only some of them have been saved."""
        return sum(leak.count for leak in self.leaks)

    @property
    def fingerprint(self) -> str:
        """That of each of the leaks."""
        return self.leaks[0].fingerprint


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one scan found.

    Attributes:
        taken_at: Seconds since the epoch.
        open_sockets: Open sockets that the guard tracks.
        fd_used: Descriptors that the process has open, of any kind; None where nobody knows.
        fd_limit: The soft limit on descriptors; None when there is none.
        leaks: Suspects, accused or explained. An object with nothing wrong is not among them.
        alerts: What a series of reports shows, when it begins, gets worse and ends; in a scan,
            which is no part of a series, the thresholds that are crossed at this moment.
        observations: The healthy sockets, of a full scan only.
        closed: Those accused in the report before that have been closed since; none in a scan.
        omitted: Accused leaks that were left out, because they were told before or matter less.
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
    leaks: tuple[Leak, ...]
    alerts: tuple[Alert, ...] = ()
    observations: tuple[Observation, ...] = ()
    closed: tuple[Closed, ...] = ()
    omitted: int = 0

    @property
    def accused(self) -> tuple[Leak, ...]:
        """The leaks that the program is to blame for."""
        return tuple(leak for leak in self.leaks if leak.accused)

    def by_site(self) -> tuple[SiteGroup, ...]:
        """Group the leaks by verdict and creation stack, worst first."""
        groups: dict[object, list[Leak]] = {}
        for leak in self.leaks:
            groups.setdefault(site_key(leak), []).append(leak)
        return tuple(sorted((_group(leaks) for leaks in groups.values()), key=_badness))


def site_key(leak: Leak) -> object:
    """What leaks of one group have in common."""
    record = leak.observation.record
    return leak.verdict, record.origin, record.birth.stack, record.site


def _group(leaks: list[Leak]) -> SiteGroup:
    return SiteGroup(
        verdict=leaks[0].verdict,
        severity=max((leak.severity for leak in leaks), key=lambda severity: severity.rank),
        site=leaks[0].observation.record.site,
        leaks=tuple(leaks),
    )


def _badness(group: SiteGroup) -> tuple[bool, int, int, int]:
    accused = group.verdict.accused
    return (not accused, -group.severity.rank, -group.count, group.verdict.rank)


class Reporter(Protocol):
    """Whatever can be called with a report: a function, a bound method, an object."""

    def __call__(self, report: Report, /) -> object:
        """Tell of the report; raise nothing that the program should see."""
