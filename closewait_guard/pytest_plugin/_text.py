"""The leaks of a report as text, a block for each site.

What a test or fixture that leaked is told: the report, a line of it, and properties.

What the terminal shows at the end of the run: pure.

Leaks as GitHub shows them beside the line of code: pure.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from closewait_guard._format import escape_line, format_duration, pluralize
from closewait_guard._render import Section, frame_lines, sections
from closewait_guard.model import Finding, Frame, FrameKind, Report, SocketRecord
from closewait_guard.pytest_plugin._attribution import OPENED_IN
from closewait_guard.pytest_plugin._findings import (
    Outcome,
    OwnerFinding,
    Site,
    location,
    relative,
    sites,
)

__all__ = [
    "blocks",
    "cannot_see",
    "commands",
    "failure_text",
    "headline",
    "properties",
    "summary",
    "trimmed",
]


def blocks(report: Report, *, whole_stacks: bool = False) -> list[str]:
    """The lines; with whole stacks, each call of a birth is told."""
    sites = [part for part in sections(report) if part.group is not None]
    return [line for site in sites for line in ("", *_lines(site, whole_stacks=whole_stacks))][1:]


def _lines(site: Section, *, whole_stacks: bool) -> Iterator[str]:
    yield from site.lines
    if whole_stacks and site.group is not None:
        yield "  the whole stack, innermost call first:"
        for frame in site.group.findings[0].observation.record.opener.stack:
            yield from frame_lines("    ", frame)


def cannot_see(report: Report) -> list[str]:
    """The last paragraph of a report."""
    return list(sections(report))[-1].lines


_MOST_PLACES = 3

# Where pytest calls a test, a doctest or a fixture.
_CALLS_OF_PYTEST = frozenset(
    {"pytest_pyfunc_call", "runtest", "call_fixture_func", "_teardown_yield_fixture"}
)


def failure_text(finding: OwnerFinding, *, whole_stacks: bool = False) -> str:
    """What the test's error shows: who, how many, and the blocks of the report."""
    report = finding.report
    if report is None:
        return ""
    waited = f", {format_duration(finding.waited)} after its end" if finding.waited >= 0.05 else ""
    head = f"{finding.owner} leaked {pluralize(len(report.findings), 'socket')}{waited}"
    shown = report if whole_stacks else trimmed(report)
    return "\n".join([escape_line(head), "", *blocks(_unnamed(shown), whole_stacks=whole_stacks)])


def headline(finding: OwnerFinding, root: Path) -> str:
    """The one line of it that pytest's short summary has room for."""
    if finding.report is None:
        return ""
    found = sites([finding])
    places = [location(site.frame, root) for site in found[:_MOST_PLACES]]
    if len(found) > _MOST_PLACES:
        places.append(pluralize(len(found) - _MOST_PLACES, "more line"))
    who = "" if finding.kind == "test" else f"{finding.owner} "
    leaked = f"leaked {pluralize(len(finding.report.findings), 'socket')}"
    return escape_line(f"{who}{leaked}: {', '.join(places)}")


def properties(finding: OwnerFinding) -> list[tuple[str, object]]:
    """What the XML file tells of a leaking test: how many, and each verdict with its line."""
    leaks = finding.report.findings if finding.report is not None else ()
    found: list[tuple[str, object]] = [("socket_leaks", len(leaks))]
    for leak in leaks:
        site = leak.observation.record.site
        location = f" opened at {site.filename}:{site.lineno}" if site is not None else ""
        found.append(("socket_leak", escape_line(f"{leak.verdict}{location}")))
    return found


def trimmed(report: Report) -> Report:
    """Without the calls of pytest and the like, which every stack of a test ends with."""
    return _each_record(report, _trimmed)


def _unnamed(report: Report) -> Report:
    """Without the owner in every block: the first line names it."""
    return _each_record(report, _without_owner)


def _each_record(report: Report, change: Callable[[SocketRecord], SocketRecord]) -> Report:
    def changed(record: SocketRecord) -> SocketRecord:
        parent = changed(record.parent) if record.parent is not None else None
        return replace(change(record), parent=parent)

    def of_leak(leak: Finding) -> Finding:
        seen = replace(leak.observation, record=changed(leak.observation.record))
        return replace(leak, observation=seen)

    return replace(report, findings=tuple(of_leak(leak) for leak in report.findings))


def _trimmed(record: SocketRecord) -> SocketRecord:
    calls = enumerate(record.stack)
    outside = next((location for location, frame in calls if _is_machinery(frame)), 0)
    last = outside
    while last and record.stack[last - 1].kind is not FrameKind.USER:
        last -= 1
    # Tests that were installed with their package look like a library.
    kept = last or outside
    return replace(record, stack=record.stack[:kept]) if kept else record


def _is_machinery(frame: Frame) -> bool:
    name = frame.function.rpartition(".")[2]
    return name in _CALLS_OF_PYTEST and "/_pytest/" in frame.filename.replace("\\", "/")


def _without_owner(record: SocketRecord) -> SocketRecord:
    context = {name: value for name, value in record.context.items() if name != OPENED_IN}
    return replace(record, context=context)


_MOST_OWNERS = 3
_MOST_SETTLES = 3
_SHORT_SETTLE = 0.05

_SAID = {
    Outcome.FAILED: "leaked",
    Outcome.WARNED: "leaked (socket_leaks=warn)",
    Outcome.ALLOWED: "leaked, and allowed to",
}


def summary(
    findings: Sequence[OwnerFinding], root: Path, *, whole_stacks: bool = False
) -> list[str]:
    """The lines of the section; none when there is nothing to tell."""
    lines: list[str] = []
    for site in sites(findings):
        lines += [*_site_lines(site, root, whole_stacks=whole_stacks), ""]
    lines += _waivers(findings)
    if lines:
        lines += [*_settles(findings), *_not_seen(findings)]
    return [escape_line(line) for line in lines]


def _site_lines(site: Site, root: Path, *, whole_stacks: bool) -> Iterator[str]:
    verdicts = Counter(leak.verdict.replace("_", " ") for leak in site.findings)
    told = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
    kinds = Counter(finding.kind for finding in site.owners)
    by = " and ".join(pluralize(number, kind) for kind, number in kinds.items())
    sockets = f"{pluralize(len(site.findings), 'socket')} ({told})"
    yield f"{location(site.frame, root)}: {sockets} {_SAID[site.outcome]} by {by}"
    for finding in site.owners[:_MOST_OWNERS]:
        notes = ", ".join(note for note in (finding.worker, finding.reason) if note)
        yield f"    {finding.owner}" + (f" ({notes})" if notes else "")
    if len(site.owners) > _MOST_OWNERS:
        yield f"    and {len(site.owners) - _MOST_OWNERS} more"
    first = site.owners[0].report
    if whole_stacks and first is not None:
        report = replace(first, findings=site.findings)
        yield from ("  " + line for line in blocks(report, whole_stacks=True))


def _waivers(findings: Sequence[OwnerFinding]) -> Iterator[str]:
    for finding in findings:
        if finding.outcome is Outcome.UNUSED_WAIVER:
            yield (
                f"{finding.owner} is allowed to leak sockets ({finding.reason}) and does not any "
                "more: remove its allow_socket_leaks marker"
            )


def _settles(findings: Sequence[OwnerFinding]) -> Iterator[str]:
    waited = [finding for finding in findings if finding.waited >= _SHORT_SETTLE]
    slowest = sorted(waited, key=lambda finding: -finding.waited)[:_MOST_SETTLES]
    if slowest:
        told = ", ".join(f"{format_duration(each.waited)} {each.owner}" for each in slowest)
        yield f"Slowest to settle: {told}"


def _not_seen(findings: Sequence[OwnerFinding]) -> Iterator[str]:
    reports = [finding.report for finding in findings if finding.report is not None]
    if reports:
        yield from cannot_see(reports[-1])


_LEVELS = {Outcome.FAILED: "error", Outcome.WARNED: "warning"}


def commands(findings: Iterable[OwnerFinding], root: Path) -> Iterator[str]:
    """One command of GitHub Actions for each birth site."""
    for site in sites(findings):
        level = _LEVELS.get(site.outcome)
        if level is not None and site.frame is not None:
            path = _relative(site.frame.filename, root)
            yield f"::{level} file={_escaped(path, ',:')},line={site.frame.lineno}::{_said(site)}"


def _said(site: Site) -> str:
    sockets = pluralize(len(site.findings), "socket")
    hint = site.findings[0].hint
    return _escaped(f"{sockets} opened here leaked by {site.who()}; fix: {hint}")


def _relative(filename: str, root: Path) -> str:
    """Relative to the checkout: GitHub knows no other files."""
    base = os.environ.get("GITHUB_WORKSPACE") or str(root)
    path = relative(filename, base)
    return path if path == filename else path.replace("\\", "/")


def _escaped(text: str, further: str = "") -> str:
    text = escape_line(text)
    for character in "%\r\n" + further:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
