"""From what was seen of a process to its report, by the same rules as from inside.

Which way to look at processes suits this platform.

Looks from outside, one after the other, and what is remembered from one to the next.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import NamedTuple

from closewait_guard._format import pluralize
from closewait_guard._inspect import SuspectAge, make_observation, suspect_for, update_age
from closewait_guard._judge import hint_for, judge, threshold_alerts
from closewait_guard._processes.model import (
    Backend,
    Descriptor,
    Inaccessible,
    ProcessSnapshot,
    SharedBy,
)
from closewait_guard._redact import Mask, Redaction
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import (
    SCHEMA,
    Coverage,
    Finding,
    Observation,
    Origin,
    Report,
    SocketRecord,
    State,
    Verdict,
)
from closewait_guard.settings import Settings

__all__ = [
    "Known",
    "ProcessReport",
    "ProcessScan",
    "ProcessScanner",
    "build_report",
    "choose_backend",
    "record_from_outside",
]


# It does not show from outside.
_CLOSE_CALLED = False

# By process, descriptor and inode.
_Key = tuple[int, int, int | None]
Known = dict[_Key, SuspectAge]


def build_report(
    sight: ProcessSnapshot,
    settings: Settings,
    before: Known,
    after: Known | None,
    now: float,
    *,
    everything: bool,
) -> Report:
    """The report of one process.

    Args:
        sight: What was seen.
        settings: The thresholds.
        before: What the look before has remembered.
        after: Takes what this one remembers; None if it is the last.
        now: The monotonic time of the look.
        everything: Tell the healthy sockets too.
    """
    pid = sight.process.pid
    records = _Records(sight)
    ended = []
    for each in sight.ended:
        key = (pid, each.fd, each.endpoint.inode)
        ages = _ages(each, key, before, after, now)
        ended.append(make_observation(records.of(each), each.fd, each.endpoint, each.view, *ages))
    leaks = judge(ended, settings, sight.process.fd_limit)
    spared = [leak.observation for leak in leaks if leak.verdict is Verdict.OPEN]
    healthy = [
        make_observation(records.of(each), each.fd, each.endpoint, each.view)
        for each in sight.others
    ]
    wrong = [_explained(leak, sight) for leak in leaks if leak.verdict is not Verdict.OPEN]
    report = _report(
        sight,
        tuple(wrong),
        (*spared, *healthy) if everything else (),
    )
    return replace(report, alerts=threshold_alerts(report, settings))


def _ages(
    each: Descriptor, key: _Key, before: Known, after: Known | None, now: float
) -> tuple[float | None, float | None]:
    """For how long the peer has been gone, and nothing been done about it."""
    dated = each.view.fin_for
    if dated is not None and after is None:
        return dated, dated
    age = update_age(each.view, _CLOSE_CALLED, before.get(key), 0.0, now)
    if after is not None:
        after[key] = age
    # A look from outside that is the first to see an end knows nothing of its age.
    closed_for = None if dated is None else now - age.since
    return closed_for, suspect_for(each.view, age, now)


def record_from_outside(
    pid: int, origin: Origin, parent: SocketRecord | None = None
) -> SocketRecord:
    """All that is known of a birth that nobody has watched."""
    return SocketRecord(0, pid, None, "", None, (), {}, origin, parent, ())


class _Records:
    """One record for all descriptors of a process that have come to it in the same way."""

    def __init__(self, sight: ProcessSnapshot) -> None:
        self._copies = sight.copies
        pid, self._parent = sight.process.pid, sight.process.parent
        own = Origin.ADOPTED if sight.process.python else Origin.NATIVE
        self._plain = {
            accepted: record_from_outside(pid, Origin.ACCEPTED if accepted else own)
            for accepted in (False, True)
        }
        self._inherited = {
            accepted: record_from_outside(
                pid,
                Origin.INHERITED,
                record_from_outside(self._parent, Origin.ACCEPTED if accepted else own),
            )
            for accepted in (False, True)
        }

    def of(self, each: Descriptor) -> SocketRecord:
        copies = self._copies.get(each.endpoint.inode or 0, ())
        if copies and any(copy.pid == self._parent for copy in copies):
            return self._inherited[each.accepted]
        return self._plain[each.accepted]


def _explained(finding: Finding, sight: ProcessSnapshot) -> Finding:
    """With a hint, and who else has the same socket open: it ends when all have closed it."""
    seen, own = finding.observation, sight.process.pid
    copies = sight.copies.get(seen.inode or 0, ())
    others = [copy for copy in copies if (copy.pid, copy.fd) != (own, seen.fd)]
    # A program in C has no `with`.
    origin = seen.record.origin if sight.process.python else Origin.NATIVE
    return replace(
        finding,
        holders=tuple(_told(copy, own) for copy in others),
        hint=hint_for(finding.verdict, origin, seen.evidence, seen.connection),
    )


def _told(copy: SharedBy, own: int) -> str:
    if copy.pid == own:
        return f"descriptor {copy.fd} of the same process too"
    return f"process {copy.pid} ({copy.program}) too"


def _report(
    sight: ProcessSnapshot, leaks: tuple[Finding, ...], observations: tuple[Observation, ...]
) -> Report:
    process = sight.process
    return Report(
        schema=SCHEMA,
        taken_at=time.time(),
        host=socket.gethostname(),
        pid=process.pid,
        command=process.program,
        python=process.python,
        open_sockets=sum(sight.states.values()),
        fd_used=process.fd_used,
        fd_limit=process.fd_limit,
        coverage=Coverage(0, 0, 0, 0, 0, tuple(_notes(sight))),
        findings=leaks,
        observations=observations,
    )


def _notes(sight: ProcessSnapshot) -> Iterator[str]:
    how = ": for that start it by `closewait-guard run`" if sight.process.python else ""
    yield f"from outside where a socket was opened{how}"
    if not sight.dated and sight.states.get(State.CLOSE_WAIT):
        yield "since when the peers have closed, which the kernel has told nobody"
    closed = sight.states.get(State.CLOSE, 0)
    if closed:
        yield (
            f"since when {pluralize(closed, 'TCP socket')} without a connection "
            "(never connected, refused or reset) has been so"
        )
    unix = sight.states.get("UNIX", 0)
    if unix:
        yield f"whether the peers of {pluralize(unix, 'UNIX socket')} have closed"
    for address, times in sight.backlog.items():
        yield (
            f"who is to take {pluralize(times, 'connection')} in CLOSE_WAIT from the backlog of "
            f"{address}, which nobody has accepted"
        )
    for address, times in sight.uncertain_backlog.items():
        yield (
            f"which process is to take {pluralize(times, 'connection')} in CLOSE_WAIT from the "
            f"backlog of {address}: another listens at this address, too"
        )


def choose_backend(probe: str) -> Backend:
    """The kernel's own tables on Linux, psutil elsewhere, or as the setting `probe` wants it."""
    on_linux = sys.platform == "linux"
    if probe == "linux" and not on_linux:
        raise ConfigurationError(f"probe must be auto or portable on {sys.platform}, not 'linux'")
    if on_linux and probe != "portable":
        from closewait_guard._processes import linux

        return linux
    from closewait_guard._processes import psutil

    return psutil


class ProcessReport(NamedTuple):
    """One process: its report, and what a report has no room for.

    Attributes:
        states: How many sockets are in each TCP state; other sockets by their protocol.
        backlog: Connections that the peer has closed before anybody accepted them, by address.
        uncertain_backlog: The same, where another process listens at that address, too.
        narrowed: The report has been cut down to some states.
    """

    report: Report
    states: Mapping[str, int]
    backlog: Mapping[str, int]
    uncertain_backlog: Mapping[str, int]
    narrowed: bool = False

    def only(self, states: Set[str]) -> ProcessReport:
        """The same, of the sockets in some states."""
        leaks = tuple(leak for leak in self.report.findings if leak.observation.state in states)
        others = tuple(seen for seen in self.report.observations if seen.state in states)
        report = replace(self.report, findings=leaks, observations=others)
        return self._replace(report=report, narrowed=True)


class ProcessScan(NamedTuple):
    """What one look found.

    Attributes:
        refused: Processes that are none, or may not be looked into.
        strays: By user, sockets in CLOSE_WAIT whose process may not be seen.
        undated: There are connections whose end nobody has dated: a second look can tell whether
            the grace time has passed.
        hides: There may be processes of other users, which the platform does not even list.
    """

    glances: tuple[ProcessReport, ...]
    refused: Sequence[Inaccessible]
    strays: Mapping[int, Sequence[Observation]]
    undated: bool
    hides: bool = False


class ProcessScanner:
    """Looks at processes from outside, and remembers since when the undated have been as they are.

    Args:
        settings: The thresholds, and the probe: `portable` asks psutil on Linux, too.
        in_series: Each look is to be followed by another, so that all is remembered.
    """

    def __init__(self, settings: Settings, *, in_series: bool = False) -> None:
        self._settings = settings
        self._redaction = Redaction(settings.redact)
        self._in_series = in_series
        self._looker = choose_backend(settings.probe)
        self._known: Known = {}

    def with_descendants(self, pids: Sequence[int]) -> list[int]:
        """The processes, with all those that they have started, and so on."""
        return self._looker.descendants(pids)

    def look(self, pids: Sequence[int] | None = None, *, everything: bool = False) -> ProcessScan:
        """Look once.

        Args:
            pids: The processes to look at; None for all.
            everything: Describe the healthy sockets too.
        """
        seen = self._looker.look(pids, everything=everything)
        now, known = seen.at, self._known
        self._known = {}
        glances = []
        for sight in seen.sights:
            # What the kernel dates needs no memory, but for progress in reading.
            after = self._known if self._in_series or not sight.dated else None
            report = build_report(sight, self._settings, known, after, now, everything=everything)
            glances.append(
                ProcessReport(report, sight.states, sight.backlog, sight.uncertain_backlog)
            )
        strays: dict[int, list[Observation]] = {}
        for stray in seen.strays:
            found = stray.descriptor
            record = record_from_outside(0, Origin.ACCEPTED if found.accepted else Origin.NATIVE)
            view = found.view
            observation = make_observation(record, found.fd, found.endpoint, view, view.fin_for)
            strays.setdefault(stray.uid, []).append(observation)
        undated = any(not each.dated and State.CLOSE_WAIT in each.states for each in seen.sights)
        found_now = ProcessScan(tuple(glances), seen.refused, strays, undated, seen.hides)
        return self._redaction.apply(lambda mask: _masked(found_now, mask), found_now)


def _masked(found: ProcessScan, mask: Mask) -> ProcessScan:
    """What may be told of other processes."""
    return found._replace(
        glances=tuple(_masked_glance(glance, mask) for glance in found.glances),
        refused=[each._replace(program=mask.text(each.program)) for each in found.refused],
        strays={
            uid: [mask.observation(seen) for seen in those] for uid, those in found.strays.items()
        },
    )


def _masked_glance(glance: ProcessReport, mask: Mask) -> ProcessReport:
    return glance._replace(
        report=mask.report(glance.report),
        backlog=mask.counts(glance.backlog),
        uncertain_backlog=mask.counts(glance.uncertain_backlog),
    )
