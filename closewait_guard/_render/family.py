"""Render several reports: those of a program's processes as one, and what changed since another.

Both compare what different processes have found, site by site. Pure.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import NamedTuple

from closewait_guard._format import Layout, block_lines, format_time, pluralize, unique
from closewait_guard._render.descriptors import (
    descriptor_kinds,
    fd_numbers,
    is_fd_share_news,
)
from closewait_guard._render.site import describe_site
from closewait_guard._render.text import (
    Scope,
    join_sections,
    native_note,
    scope_of,
    sections_in,
)
from closewait_guard.model import (
    Coverage,
    Finding,
    Observation,
    OpenAtEnd,
    Origin,
    Report,
    SiteGroup,
    Verdict,
)

__all__ = [
    "LastReport",
    "MergedReport",
    "ToLines",
    "difference",
    "group_by_peer",
    "has_more",
    "merge_family",
    "peer_phrase",
    "render_family",
    "sum_reports",
]


_MAX_PROCESSES = 4


class LastReport(NamedTuple):
    """What is known of one process of a program.

    Attributes:
        report: Its last report.
        is_last: It was made as the program ended; else it is the last that was made before.
        is_before_exec: It ended because another took its place in the process.
    """

    report: Report
    is_last: bool = True
    is_before_exec: bool = False

    @property
    def has_sockets(self) -> bool:
        """Whether the process has ever had any."""
        report = self.report
        return bool(report.open_sockets or report.findings or report.coverage.opened)


class MergedReport(NamedTuple):
    """The reports of a program's processes as one.

    Attributes:
        report: Of one process as it is; of several the sum.
        scope: Of which processes it is.
        notes: Which of the reports are older than the end of their process.
    """

    report: Report
    scope: Scope
    notes: Sequence[str]


def render_family(
    members: Sequence[LastReport], layout: Layout | None = None, *, is_complete: bool = True
) -> str:
    """Render the reports of a program's processes, merged by `merge_family`.

    Args:
        members: The last report of each process, and those of programs that `exec` replaced.
        layout: The width, and the directory that paths are relative to.
        is_complete: Whether they are of all processes that may have leaked.
    """
    layout = layout or Layout()
    merged = merge_family(members, is_complete=is_complete)
    notes = [f"{line}\n" for note in merged.notes for line in layout.wrap(note, "  ")]
    text = join_sections(sections_in(merged.report, layout, merged.scope))
    return "".join([text, *notes])


def merge_family(members: Sequence[LastReport], *, is_complete: bool = True) -> MergedReport:
    """Merge the reports of a program's processes: that of the program itself comes first.

    Processes that have had no sockets are left out; one that is left alone stays as it is.

    Args:
        members: The last report of each process, and those of programs that `exec` replaced.
        is_complete: Whether they are of all processes that may have leaked.
    """
    first, *others = members
    shown = [member for member in members if member.has_sockets] or [first]
    if not any(member.has_sockets for member in others):
        shown = [first]
    notes = _notes(shown)
    if shown == [first] and is_complete:
        return MergedReport(first.report, scope_of(first.report), notes)
    reports = [member.report for member in shown]
    kept, pids_of = _without_repeats(reports)
    return MergedReport(_sum(kept), _scope(reports, pids_of, is_complete=is_complete), notes)


def _scope(reports: Sequence[Report], pids_of: dict[int, _Pids], *, is_complete: bool) -> Scope:
    """Which processes they are of, and which each site is in."""

    def where_of(group: SiteGroup) -> str:
        counts: Counter[_Pids] = Counter()
        for finding in group.findings:
            counts[pids_of[id(finding)]] += finding.count
        return _processes(counts) if len(pids) > 1 else ""

    pids = {report.pid for report in reports}
    fullest = max(reports, key=lambda report: report.fd_used or 0)
    descriptors = fd_numbers(fullest)
    host = f" on {reports[0].host}" if reports[0].host else ""
    return Scope(
        who=(f"pid {reports[0].pid}" if len(pids) == 1 else pluralize(len(pids), "process")) + host,
        where=_where_in(reports),
        descriptors=f"at most {descriptors}" if len(reports) > 1 else descriptors,
        kinds=descriptor_kinds(fullest),
        is_descriptors_news=any(map(is_fd_share_news, reports)),
        where_of=where_of,
        is_complete=is_complete,
    )


_Pids = tuple[int, ...]


def _without_repeats(reports: Sequence[Report]) -> tuple[list[Report], dict[int, _Pids]]:
    """The reports with each socket in one of them, and which processes report each finding.

    Over `fork()` and `exec` a socket comes to another program, which may find the same.
    """
    found: dict[object, list[tuple[Report, Finding]]] = defaultdict(list)
    for report in reports:
        for finding in report.findings:
            found[_identity_of(finding)].append((report, finding))
    best = {key: max(those, key=_rank)[0] for key, those in found.items()}
    kept = [
        replace(
            report,
            findings=tuple(each for each in report.findings if best[_identity_of(each)] is report),
        )
        for report in reports
    ]
    pids_of = {
        id(finding): tuple(dict.fromkeys(report.pid for report, _ in those))
        for those in found.values()
        for _, finding in those
    }
    return kept, pids_of


def _identity_of(finding: Finding) -> object:
    # In a long report one stands for several.
    return id(finding) if finding.count > 1 else _identity(finding.observation)


def _identity(seen: Observation) -> object:
    """What two processes that have the same socket agree on; no other observation has it."""
    return (seen.inode, seen.family, seen.type, seen.local) if seen.inode else id(seen)


def _rank(reported: tuple[Report, Finding]) -> tuple[object, ...]:
    """Of one socket, the process that has opened it knows the most, then one that has it."""
    report, finding = reported
    record = finding.observation.record
    is_own = record.pid == report.pid
    return finding.is_leak, record.origin is not Origin.INHERITED, is_own, report.taken_at


def _where_in(reports: Sequence[Report]) -> str:
    """In how many of the processes there are leaks; of one that leaks the header says it."""
    pids = {report.pid for report in reports}
    leaking = len({report.pid for report in reports if report.leaks})
    if len(pids) == 1:
        return "" if leaking else f" in process {reports[0].pid}"
    processes = pluralize(len(pids), "process")
    return f" in {leaking:,} of {processes}" if leaking else f" in {processes}"


def _processes(counts: Counter[_Pids]) -> str:
    """The processes that the sockets of a site are in, and how many in each."""
    names = {pids: " and ".join(map(str, pids)) for pids in counts}
    if len(counts) == 1:
        return next(iter(names.values()))
    most = counts.most_common(_MAX_PROCESSES)
    parts = [f"{names[pids]} ({number:,})" for pids, number in most]
    more = len(counts) - _MAX_PROCESSES
    return ", ".join(parts) + (f" and {more:,} more" if more > 0 else "")


def sum_reports(reports: Sequence[Report]) -> Report:
    """One report of all processes, with each socket once, and all their descriptors."""
    used = [report.fd_used for report in reports if report.fd_used is not None]
    total = sum(used) if len(used) == len(reports) else None
    return replace(_sum(_without_repeats(reports)[0]), fd_used=total)


def _sum(reports: Sequence[Report]) -> Report:
    """One report of all sockets, with the process and the descriptors of the first."""
    coverages = [report.coverage for report in reports]
    alerts = (
        replace(alert, message=f"in process {report.pid}: {alert.message}")
        for report in reports
        for alert in report.alerts
    )
    natives = [coverage.native for coverage in coverages if coverage.native is not None]
    coverage = Coverage(
        opened=sum(coverage.opened for coverage in coverages),
        adopted=sum(coverage.adopted for coverage in coverages),
        dropped=sum(coverage.dropped for coverage in coverages),
        forgotten=sum(coverage.forgotten for coverage in coverages),
        failures=sum(coverage.failures for coverage in coverages),
        notes=(),
        native=sum(natives) if natives else None,
        attributed=sum(coverage.attributed for coverage in coverages),
        earlier=sum(coverage.earlier for coverage in coverages),
        leaks_unknown=tuple(unique(why for each in coverages for why in each.leaks_unknown)),
    )
    notes = (_native_note_of(reports, coverage), *_other_notes(coverages))
    healthy = {_identity(seen): seen for report in reports for seen in report.observations}
    return replace(
        reports[0],
        open_sockets=sum(report.open_sockets for report in reports),
        findings=tuple(finding for report in reports for finding in report.findings),
        alerts=tuple(alerts),
        observations=tuple(healthy.values()),
        closed_late=(),
        omitted=sum(report.omitted for report in reports),
        open_at_end=_open_at_end(reports),
        coverage=replace(coverage, notes=notes),
        redacted=any(report.redacted for report in reports),
    )


def _open_at_end(reports: Sequence[Report]) -> tuple[OpenAtEnd, ...]:
    """What was open at the ends of the processes, each line once, the most first."""
    found: dict[tuple[str, str], OpenAtEnd] = {}
    for each in (each for report in reports for each in report.open_at_end):
        key = each.name, each.place
        known = found.get(key, replace(each, count=0, processes=0))
        count, processes = known.count + each.count, known.processes + each.processes
        found[key] = replace(each, count=count, processes=processes)
    return tuple(sorted(found.values(), key=lambda each: -each.count))


def _native_note_of(reports: Sequence[Report], total: Coverage) -> str:
    """The sockets of native code, and of which processes the sum does not have them."""
    unknown = {report.pid: report.coverage for report in reports if report.coverage.native is None}
    if total.native is None or not unknown:
        return native_note(total)
    pid, coverage = min(unknown.items(), key=itemgetter(0))
    named = f"process {pid}" if len(unknown) == 1 else pluralize(len(unknown), "process")
    known = native_note(total)
    return f"{known}{', and ' if known else ''}{native_note(coverage)} in {named}"


_WITHOUT_HOLDERS = re.compile(r"what holds ([\d,]+) sockets? (.*)")


def _other_notes(coverages: Sequence[Coverage]) -> list[str]:
    """Each of all processes once; the sockets without known holders are added up."""
    notes: list[str] = []
    unsearched: dict[str, int] = {}
    for coverage in coverages:
        for note in coverage.notes:
            if found := _WITHOUT_HOLDERS.fullmatch(note):
                reason, many = found[2], int(found[1].replace(",", ""))
                unsearched[reason] = unsearched.get(reason, 0) + many
            elif note != native_note(coverage):
                notes.append(note)
    notes += [f"what holds {pluralize(many, 'socket')} {why}" for why, many in unsearched.items()]
    return unique(notes)


def _notes(members: Sequence[LastReport]) -> list[str]:
    """Which reports are older than the end of their process, each process once."""
    notes: dict[tuple[int, bool], str] = {}
    older = [member for member in members if not (member.is_last or member.is_before_exec)]
    if len(older) > _MAX_PROCESSES:
        times = [member.report.taken_at for member in older]
        first, last = (format_time(at, " %Z") for at in (min(times), max(times)))
        notes[0, False] = (
            f"{pluralize(len(older), 'process')} are shown as of when they last reported, "
            f"between {first} and {last}."
        )
        members = [member for member in members if member.is_last or member.is_before_exec]
    for member in members:
        at, pid = format_time(member.report.taken_at, " %Z"), member.report.pid
        if not member.is_last:
            notes[pid, member.is_before_exec] = (
                f"Process {pid} is shown as of {at}, when it last reported."
            )
        if member.is_before_exec:
            notes[pid, member.is_before_exec] = (
                f"Process {pid} became another program by exec: what it had open before is shown "
                f"as of {at}."
            )
    return list(notes.values())


# From one report to another.


ToLines = Callable[[SiteGroup, Layout], Iterable[str]]


def difference(
    before: Report,
    after: Report,
    layout: Layout | None = None,
    lines_of_test: ToLines | None = None,
) -> Iterator[str]:
    """Lines: how many sites are new, growing, shrinking and gone, then each of them.

    Args:
        before: What was found first.
        after: What was found later, in whatever process.
        layout: The width.
        lines_of_test: Renders a site, if the reports are the findings of test runs.
    """
    of_tests = lines_of_test is not None
    layout = layout or Layout()
    old, new = _by_name(before, of_tests=of_tests), _by_name(after, of_tests=of_tests)
    changes = {name: new[name].count - old[name].count for name in new if name in old}
    kinds = {
        "NEW": [name for name in new if name not in old],
        "GROWING": [name for name, change in changes.items() if change > 0],
        "SHRINKING": [name for name, change in changes.items() if change < 0],
        "GONE": [name for name in old if name not in new],
        "UNCHANGED": [name for name, change in changes.items() if not change],
    }
    parts = [f"{len(names)} {kind.lower()}" for kind, names in kinds.items() if names]
    sockets = f"{before.open_sockets:,} open sockets then, {after.open_sockets:,} now"
    descriptors = f"{_used(before)} descriptors then, {_used(after)} now"
    # Those of a test run are only of the moment of its first finding.
    counts = [] if of_tests else [sockets, descriptors]
    sites = f"Sites: {', '.join(parts) or 'none'}"
    yield from layout.wrap("; ".join([sites, *counts]), "  ")
    to_lines = lines_of_test or _site_lines
    for kind, names in kinds.items():
        for name in names if kind != "UNCHANGED" else ():
            yield ""
            yield f"{_describe_change(kind, old.get(name), new.get(name))}:"
            yield from to_lines(new.get(name) or old[name], layout)


def has_more(before: Report, after: Report, *, of_tests: bool = False) -> bool:
    """Whether any site has more of what a difference compares."""
    old, new = (_by_name(report, of_tests=of_tests) for report in (before, after))
    return any(name not in old or group.count > old[name].count for name, group in new.items())


def _describe_change(kind: str, old: SiteGroup | None, new: SiteGroup | None) -> str:
    if old is None or new is None:
        return kind
    return f"{kind}, from {old.count:,} to {new.count:,} ({new.count - old.count:+,})"


def _site_lines(group: SiteGroup, layout: Layout) -> Iterator[str]:
    block = describe_site(group, verbose=layout.verbose)
    yield from (line.text for line in block_lines(block, layout))


def _by_name(report: Report, *, of_tests: bool) -> dict[str, SiteGroup]:
    """By what names a site in whatever process; without a stack, the peers distinguish sites."""
    groups: dict[str, SiteGroup] = {}
    for group in report.by_site():
        if of_tests:
            # Whether the peer has closed before the check is a matter of time, and no news.
            name = replace(group.findings[0], verdict=Verdict.OPEN).fingerprint
            earlier = groups[name].findings if name in groups else ()
            groups[name] = replace(group, findings=(*earlier, *group.findings))
        elif not group.verdict.is_leak:
            # What is closing at one moment is gone at the next, and no news.
            continue
        elif group.site is None:
            for (_, peer), findings in group_by_peer(group.findings).items():
                name = f"{group.fingerprint} {peer}"
                groups[name] = replace(group, findings=tuple(findings))
        else:
            groups[group.fingerprint] = group
    return groups


def _used(report: Report) -> str:
    return "an unknown number of" if report.fd_used is None else f"{report.fd_used:,}"


def group_by_peer(findings: Iterable[Finding]) -> dict[tuple[Verdict, str], list[Finding]]:
    """Group findings by verdict and peer, in the order of their first appearance."""
    groups: dict[tuple[Verdict, str], list[Finding]] = {}
    for finding in findings:
        key = finding.verdict, peer_phrase(finding.observation)
        groups.setdefault(key, []).append(finding)
    return groups


def peer_phrase(seen: Observation) -> str:
    """What the socket is connected to; the port of a client says nothing."""
    if seen.peer is None:
        return f"at {seen.local}" if seen.local else ""
    return f"from {_host_of(seen.peer)}" if _came_to_us(seen) else f"to {seen.peer}"


def _came_to_us(seen: Observation) -> bool:
    """Whether the other end has made the connection."""
    record = seen.record
    return Origin.ACCEPTED in (record.origin, record.parent.origin if record.parent else None)


def _host_of(address: str) -> str:
    """An address without its port.

    Example:
        >>> _host_of("[::1]:80"), _host_of("10.0.0.1:80")
        ('[::1]', '10.0.0.1')
    """
    return address.rpartition(":")[0] or address
