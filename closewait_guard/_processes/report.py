"""Scan other processes, and make a report of each by the same rules as from inside.

The platform's backend takes the snapshots; what a snapshot cannot date is remembered from one scan
to the next.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from closewait_guard._enums import is_about_descriptors
from closewait_guard._format import pluralize
from closewait_guard._inspect import (
    ProbeResult,
    SuspectAge,
    make_observation,
    suspect_for,
    update_age,
)
from closewait_guard._judge import cause_code, hint_for, judge, leave_undecided, threshold_alerts
from closewait_guard._processes import procfs
from closewait_guard._processes.model import (
    Backend,
    ChildrensCopies,
    Descriptor,
    ProcessReport,
    ProcessScan,
    ProcessSnapshot,
    SharedBy,
    UnusedCopy,
)
from closewait_guard._redact import Mask, Redaction
from closewait_guard._threads import descendants_of
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import (
    SCHEMA,
    Connection,
    Coverage,
    Finding,
    Observation,
    Origin,
    Report,
    Severity,
    SocketRecord,
    State,
    Verdict,
)
from closewait_guard.settings import Settings

if TYPE_CHECKING:
    from closewait_guard._capture import ForkedSocket

__all__ = [
    "KnownAges",
    "ProcessScanner",
    "build_report",
    "choose_backend",
    "find_copies_in_children",
    "record_from_outside",
]


# More are not looked at.
_MAX_CHILDREN = 256
_MAX_NAMED = 5

# It does not show from outside.
_CLOSE_CALLED = False

# By process, descriptor and inode.
_Key = tuple[int, int, int | None]
KnownAges = dict[_Key, SuspectAge]


def build_report(
    snapshot: ProcessSnapshot,
    settings: Settings,
    before: KnownAges,
    after: KnownAges,
    now: float,
    *,
    everything: bool,
) -> Report:
    """The report of one process.

    Args:
        snapshot: What was seen.
        settings: The thresholds.
        before: What the scan before has remembered.
        after: Takes what this one remembers.
        now: The monotonic time of the scan.
        everything: Include the healthy sockets.
    """
    pid = snapshot.process.pid
    records = _Records(snapshot)
    ended = []
    for each in snapshot.ended:
        key = (pid, each.fd, each.endpoint.inode)
        age = after[key] = update_age(each.view, _CLOSE_CALLED, before.get(key), 0.0, now)
        ended.append(_observe_ended(each, records.of(each), age, now))
    ended += [_observe_copy(each, records, settings) for each in snapshot.copies]
    fd_limit = snapshot.process.fd_limit
    leaks = leave_undecided(judge(ended, settings, fd_limit), settings, fd_limit)
    spared = [leak.observation for leak in leaks if leak.verdict is Verdict.OPEN]
    copies = {each.descriptor.fd for each in snapshot.copies}
    healthy = [
        make_observation(records.of(each), each.fd, each.endpoint, each.view)
        for each in snapshot.others
        if each.fd not in copies
    ]
    report = _report(
        snapshot,
        tuple(_explain((leak for leak in leaks if leak.verdict is not Verdict.OPEN), snapshot)),
        (*spared, *healthy) if everything else (),
    )
    alerts = threshold_alerts(report, settings)
    is_named = everything or any(is_about_descriptors(alert.kind, alert.data) for alert in alerts)
    found = snapshot.process.descriptors
    if found is not None and not is_named:
        found = replace(found, names={})
    return replace(report, alerts=alerts, descriptors=found)


def _observe_ended(
    each: Descriptor, record: SocketRecord, age: SuspectAge, now: float
) -> Observation:
    # A scan from outside that is the first to see an end without a date knows nothing of its age.
    is_dated = each.view.fin_for is not None
    return make_observation(
        record,
        each.fd,
        each.endpoint,
        each.view,
        now - age.since if is_dated else None,
        suspect_for(each.view, age, now),
        is_lower_bound=is_dated and age.is_bound,
    )


def _observe_copy(copy: UnusedCopy, records: _Records, settings: Settings) -> Observation:
    """What only may be unused is given as much time as a call that may never end."""
    found, seconds = copy.descriptor, copy.seconds
    is_suspect = not copy.may_be_used or seconds > settings.age_warning
    record = records.inherited(found)
    suspicious_for = seconds if is_suspect else None
    view = found.view
    return make_observation(record, found.fd, found.endpoint, view, view.fin_for, suspicious_for)


def record_from_outside(
    pid: int, origin: Origin, parent: SocketRecord | None = None
) -> SocketRecord:
    """All that is known of a socket whose creation was not recorded."""
    return SocketRecord(0, pid, None, "", None, (), {}, origin, parent, ())


class _Records:
    """One record for all descriptors of a process that have come to it in the same way."""

    def __init__(self, snapshot: ProcessSnapshot) -> None:
        self._shared_by = snapshot.shared_by
        pid, self._parent = snapshot.process.pid, snapshot.process.parent
        own = Origin.ADOPTED if snapshot.process.python else Origin.NATIVE
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
        shared_by = self._shared_by.get(each.endpoint.inode or 0, ())
        if shared_by and any(holder.pid == self._parent for holder in shared_by):
            return self.inherited(each)
        return self._plain[each.accepted]

    def inherited(self, each: Descriptor) -> SocketRecord:
        """Of one that has come over fork()."""
        return self._inherited[each.accepted]


def _explain(findings: Iterable[Finding], snapshot: ProcessSnapshot) -> Iterator[Finding]:
    """With hints, and who else has the same socket open: it ends when all have closed it."""
    own, shared_by = snapshot.process.pid, snapshot.shared_by
    holders: tuple[str, ...] = ()
    for finding in findings:
        seen = finding.observation
        # A program in C has no `with`, and no lines to find.
        origin = seen.record.origin if snapshot.process.python else Origin.NATIVE
        facts = finding.verdict, origin, seen.evidence, seen.connection
        has_line = finding.verdict is _LEAKED and origin is _ADOPTED
        hint = _FIND_LINE if has_line else hint_for(*facts)
        if shared_by:
            others = shared_by.get(seen.inode or 0, ())
            holders = tuple(
                _describe_sharing(holder, own)
                for holder in others
                if (holder.pid, holder.fd) != (own, seen.fd)
            )
        # Not by replace(), which takes five times as long: there may be many thousands.
        code = cause_code(*facts)
        yield Finding(seen, finding.verdict, finding.severity, holders, hint, code=code)


# Python 3.11 takes long to find a member by its name.
_LEAKED, _ADOPTED = Verdict.LEAKED, Origin.ADOPTED
_FIND_LINE = "find its line: restart it with `closewait-guard run --interval 60 -- COMMAND`"
if sys.platform == "linux":
    # A restart takes the evidence with it.
    _FIND_LINE = f"see what holds it, without a restart: `closewait-guard attach PID`; {_FIND_LINE}"


def _describe_sharing(holder: SharedBy, own: int) -> str:
    if holder.pid == own:
        return f"descriptor {holder.fd} of the same process too"
    return f"process {holder.pid} ({holder.program}) too"


def _report(
    snapshot: ProcessSnapshot, leaks: tuple[Finding, ...], observations: tuple[Observation, ...]
) -> Report:
    process = snapshot.process
    return Report(
        schema=SCHEMA,
        taken_at=time.time(),
        host=socket.gethostname(),
        pid=process.pid,
        command=process.program,
        python=process.python,
        open_sockets=sum(snapshot.states.values()),
        fd_used=process.fd_used,
        fd_limit=process.fd_limit,
        coverage=Coverage(0, 0, 0, 0, 0, tuple(_notes(snapshot))),
        findings=leaks,
        observations=observations,
    )


def _notes(snapshot: ProcessSnapshot) -> Iterator[str]:
    how = " (`closewait-guard run` reports it)" if snapshot.process.python else ""
    yield f"which line opened a socket{how}"
    if not snapshot.dated and snapshot.states.get(State.CLOSE_WAIT):
        yield "since when the peers have closed, which this kernel does not say"
    if closed := snapshot.states.get(State.CLOSE, 0):
        yield f"for how long {pluralize(closed, 'TCP socket')} had no connection"
    if unix := snapshot.states.get("UNIX", 0):
        yield f"whether the peers of {pluralize(unix, 'UNIX socket')} have closed"
    for address, times in snapshot.backlog.items():
        yield (
            f"who is to take {pluralize(times, 'connection')} in CLOSE_WAIT from the backlog of "
            f"{address}, which no call has accepted"
        )
    for address, times in snapshot.uncertain_backlog.items():
        yield (
            f"which process is to take {pluralize(times, 'connection')} in CLOSE_WAIT from the "
            f"backlog of {address}: another listens at this address, too"
        )


def find_copies_in_children(
    closed: Mapping[int, ForkedSocket],
    record_of: Callable[[ForkedSocket], SocketRecord],
    settings: Settings,
    *,
    of_block: bool = False,
) -> ChildrensCopies:
    """Look at the children of this process, and theirs.

    Args:
        closed: By inode, what this process has closed since it forked. A copy has the same number;
            what was handed over in another way has another.
        record_of: Makes the record of one.
        settings: The thresholds.
        of_block: All has been closed that is to be: include those that a child may use, and those
            whose peers have closed, which else are the child's own.
    """
    if sys.platform != "linux" or settings.probe == "portable":
        return ChildrensCopies({}, frozenset(closed), ())
    every = descendants_of(os.getpid(), _MAX_CHILDREN)
    children, beyond = every[:_MAX_CHILDREN], every[_MAX_CHILDREN:]
    fds = {inode: each.fd for inode, each in closed.items()}
    present, unread = procfs.present_in(children, fds)
    leaks, undecided = dict[int, Finding](), dict[int, Finding]()
    wanted = {Connection.LIVE, Connection.PEER_CLOSED} if of_block else {Connection.LIVE}
    seen_in, not_seen = _look_into(children if present else (), closed, settings, of_block)
    unread = [*unread, *not_seen]
    for found, program in seen_in:
        seen, is_leak = found.observation, found.verdict is Verdict.INHERITED
        forked = closed.get(seen.inode or 0)
        is_copy = forked is not None and forked.tcp_info and forked.fd == seen.fd
        if forked is None or not is_copy or seen.peer is None or seen.connection not in wanted:
            continue
        own = record_of(forked)
        if is_leak or own.opener.origin is not Origin.ACCEPTED:
            (leaks if is_leak else undecided)[seen.inode or 0] = _as_copy(found, program, own)
    notes = []
    if unread:
        many = pluralize(len(unread), "child process")
        named = ", ".join(map(str, unread[:_MAX_NAMED]))
        notes.append(f"what {many} may keep open: not to be read ({named})")
    if beyond:
        notes.append(f"what child processes beyond the first {_MAX_CHILDREN} keep open")
    gone = frozenset[int]() if notes else frozenset(closed.keys() - present)
    return ChildrensCopies(leaks, gone, tuple(notes), (*unread, *beyond), undecided)


def _look_into(
    pids: Sequence[int], closed: Mapping[int, ForkedSocket], settings: Settings, healthy: bool
) -> tuple[list[tuple[Finding, str]], list[int]]:
    """What some have open, with the program, and which could not be looked into."""
    if not pids:
        return [], []
    from closewait_guard._processes import linux

    at_fork = {inode: each.tcp_info for inode, each in closed.items()}
    seen = linux.take_snapshot([os.getpid(), *pids], everything=healthy, at_fork=at_fork)
    found = []
    for each in seen.snapshots:
        report = build_report(each, settings, {}, {}, seen.at, everything=healthy)
        opened = (Finding(one, Verdict.OPEN, Severity.INFO, (), "") for one in report.observations)
        found += [(finding, each.process.program) for finding in (*report.findings, *opened)]
    return found, [each.pid for each in seen.inaccessible if each.exists and each.is_a_loss]


def _as_copy(found: Finding, program: str, own: SocketRecord) -> Finding:
    """With the record in this process, which is known in no other."""
    from closewait_guard._libraries import packages_of

    seen, pid = found.observation, found.observation.record.pid
    record = replace(own, pid=pid, origin=Origin.INHERITED, parent=own)
    verdict = Verdict.INHERITED if found.verdict is Verdict.INHERITED else Verdict.OPEN
    cause = record.origin, seen.evidence, seen.connection
    return replace(
        found,
        observation=replace(seen, record=record),
        verdict=verdict,
        holders=(f"process {pid} ({program})",),
        hint=hint_for(Verdict.INHERITED, *cause),
        code=cause_code(verdict, *cause),
        **packages_of(own)._asdict(),
    )


def choose_backend(probe: str) -> Backend:
    """The kernel's own tables on Linux, psutil elsewhere, or as the setting `probe` wants it."""
    on_linux = sys.platform == "linux"
    if probe == "linux" and not on_linux:
        raise ConfigurationError(f"probe: expected auto or portable on {sys.platform}, got 'linux'")
    if on_linux and probe != "portable":
        from closewait_guard._processes import linux

        return linux
    from closewait_guard._processes import psutil

    return psutil


class ProcessScanner:
    """Scans processes from outside, and remembers since when the undated have been as they are.

    Args:
        settings: The thresholds, and the probe: `portable` asks psutil on Linux, too.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._redaction = Redaction(settings.redact)
        self._backend = choose_backend(settings.probe)
        self._ages: KnownAges = {}

    def with_descendants(self, pids: Sequence[int]) -> list[int]:
        """The processes, with all those that they have started, and so on."""
        return self._backend.descendants(pids)

    def scan(self, pids: Sequence[int] | None = None, *, everything: bool = False) -> ProcessScan:
        """Scan once.

        Args:
            pids: The processes to scan; None for all.
            everything: Describe the healthy sockets too.
        """
        seen = self._backend.take_snapshot(pids, everything=everything)
        now, known = seen.at, self._ages
        self._ages = {}
        processes = []
        for snapshot in seen.snapshots:
            report = build_report(
                snapshot, self._settings, known, self._ages, now, everything=everything
            )
            processes.append(
                ProcessReport(
                    report,
                    snapshot.process.parent,
                    snapshot.states,
                    snapshot.backlog,
                    snapshot.uncertain_backlog,
                )
            )
        unowned: dict[int, list[Observation]] = {}
        for each in seen.unowned:
            found = each.descriptor
            record = record_from_outside(0, Origin.ACCEPTED if found.accepted else Origin.NATIVE)
            view = found.view
            observation = make_observation(record, found.fd, found.endpoint, view, view.fin_for)
            unowned.setdefault(each.uid, []).append(observation)
        has_undated = any(
            (not each.dated and State.CLOSE_WAIT in each.states)
            or any(self._may_be_older(ended.view) for ended in each.ended)
            for each in seen.snapshots
        )
        found_now = ProcessScan(
            tuple(processes), seen.inaccessible, unowned, has_undated, seen.hides_processes
        )
        return self._redaction.apply(lambda mask: _mask_scan(found_now, mask), found_now)

    def _may_be_older(self, view: ProbeResult) -> bool:
        return view.is_fin_bound and (view.fin_for or 0.0) < self._settings.grace


def _mask_scan(found: ProcessScan, mask: Mask) -> ProcessScan:
    """Without what must not be reported of other processes."""
    return found._replace(
        processes=tuple(_mask_process(process, mask) for process in found.processes),
        inaccessible=[
            each._replace(program=mask.text(each.program)) for each in found.inaccessible
        ],
        unowned={
            uid: [mask.observation(seen) for seen in those] for uid, those in found.unowned.items()
        },
    )


def _mask_process(process: ProcessReport, mask: Mask) -> ProcessReport:
    return process._replace(
        report=mask.report(process.report),
        backlog=mask.counts(process.backlog),
        uncertain_backlog=mask.counts(process.uncertain_backlog),
    )
