"""What the plugin prints: errors, the summary, XML properties, GitHub annotations. Pure."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path, PurePath

from closewait_guard._format import (
    block_lines,
    escape_line,
    fit_path,
    format_duration,
    pluralize,
    truncate,
    wrap_text,
)
from closewait_guard._render import describe_site, not_covered_lines, verdict_name
from closewait_guard._stream import layout_of
from closewait_guard.model import (
    Finding,
    Frame,
    FrameKind,
    Report,
    SiteGroup,
    SocketRecord,
    Verdict,
)
from closewait_guard.pytest_plugin._attribution import OPENED_IN
from closewait_guard.pytest_plugin._findings import (
    Outcome,
    OwnerFinding,
    Site,
    format_location,
    group_by_site,
    relative_path,
)

__all__ = [
    "failure_text",
    "github_commands",
    "headline",
    "junit_properties",
    "summary_lines",
]

_MAX_PLACES = 3
_MAX_LOCATION = 30
_MAX_OWNERS = 3
_MAX_SETTLES = 3
_MIN_SETTLE_SHOWN = 0.05

# Where pytest calls a test, a doctest or a fixture.
_CALLS_OF_PYTEST = frozenset(
    {"pytest_pyfunc_call", "runtest", "call_fixture_func", "_teardown_yield_fixture"}
)

_OUTCOME_PHRASES = {
    Outcome.FAILED: "leaked",
    Outcome.WARNED: "leaked (socket_leaks=warn)",
    Outcome.STILL_RUNNING: "left to a running thread, loop or record (socket_leaks_threads=warn)",
    Outcome.ALLOWED: "leaked, and allowed to",
}
_GITHUB_LEVELS = {
    Outcome.FAILED: "error",
    Outcome.WARNED: "warning",
    Outcome.STILL_RUNNING: "warning",
}


def failure_text(finding: OwnerFinding, root: Path, *, whole_stacks: bool = False) -> str:
    """What the test's error shows: who, how many, and the blocks of the report."""
    report = finding.report
    if report is None:
        return ""
    waited = ""
    if finding.waited >= _MIN_SETTLE_SHOWN:
        waited = f", {format_duration(finding.waited)} after its end"
    head = f"{finding.owner} leaked {pluralize(len(report.findings), 'socket')}{waited}"
    if finding.reason is not None:
        head += f": {finding.reason}"
    # The first line names the owner, and every stack of a test ends with calls of pytest.
    shown = _change_records(report, _without_owner)
    if not whole_stacks:
        shown = _change_records(shown, _without_pytest_frames)
    return "\n".join([escape_line(head), "", *_site_blocks(shown, root, whole_stacks=whole_stacks)])


def headline(finding: OwnerFinding, root: Path) -> str:
    """The one line of it that pytest's short summary has room for."""
    if finding.report is None:
        return ""
    found = group_by_site([finding])
    places = [_short_location(site.frame, root) for site in found[:_MAX_PLACES]]
    if len(found) > _MAX_PLACES:
        places.append(pluralize(len(found) - _MAX_PLACES, "more line"))
    who = "" if finding.kind == "test" else f"{finding.owner} "
    leaked = f"leaked {pluralize(len(finding.report.findings), 'socket')}"
    return escape_line(f"{who}{leaked}: {', '.join(places)}")


def _short_location(frame: Frame | None, root: Path) -> str:
    """Without folders if it is long: pytest cuts the line at its end."""
    location = format_location(frame, root)
    if frame is None or len(location) <= _MAX_LOCATION:
        return location
    return f".../{PurePath(frame.filename).name}:{frame.lineno}"


def junit_properties(finding: OwnerFinding) -> list[tuple[str, object]]:
    """What the XML file says of a leaking test: how many, and each verdict with its line."""
    leaks = finding.report.findings if finding.report is not None else ()
    found: list[tuple[str, object]] = [("socket_leaks", len(leaks))]
    for leak in leaks:
        site = leak.observation.record.site
        place = f" opened at {site.filename}:{site.lineno}" if site is not None else ""
        found.append(("socket_leak", escape_line(f"{leak.verdict}{place}")))
    return found


def summary_lines(
    findings: Sequence[OwnerFinding], root: Path, *, whole_stacks: bool = False
) -> list[str]:
    """The lines of the section; none when there is nothing to report."""
    lines: list[str] = []
    in_defaults = [each for each in findings if each.outcome is Outcome.LIBRARY_DEFAULT]
    for site in group_by_site(each for each in findings if each not in in_defaults):
        lines += [*_site_lines(site, root, whole_stacks=whole_stacks), ""]
    for variable in dict.fromkeys(each.reason for each in in_defaults):
        owners = [each for each in in_defaults if each.reason == variable]
        lines += [*_default_lines(owners, root), ""]
    lines += _waiver_lines(findings)
    if lines:
        lines += [*(_settle_lines(findings) if whole_stacks else ()), *_not_covered_lines(findings)]
    return [escape_line(line) for line in lines]


def _site_lines(site: Site, root: Path, *, whole_stacks: bool) -> Iterator[str]:
    verdicts = Counter(leak.verdict.replace("_", " ") for leak in site.leaks)
    counts = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
    kinds = Counter(finding.kind for finding in site.owners)
    by = " and ".join(pluralize(number, kind) for kind, number in kinds.items())
    sockets = f"{pluralize(len(site.leaks), 'socket')} ({counts})"
    yield f"{format_location(site.frame, root)}: {sockets} {_OUTCOME_PHRASES[site.outcome]} by {by}"
    yield from _owner_lines(site.owners)
    first = site.owners[0].report
    if whole_stacks and first is not None:
        report = replace(first, findings=site.leaks)
        yield from ("  " + line for line in _site_blocks(report, root, whole_stacks=True))


def _default_lines(owners: list[OwnerFinding], root: Path) -> Iterator[str]:
    """One paragraph for each variable of a library, however many tests have used its pool."""
    leaks = [leak for each in owners if each.report is not None for leak in each.report.findings]
    first = format_location(leaks[0].observation.record.site, root)
    connections = pluralize(len(leaks), "connection")
    yield from wrap_text(
        f"{owners[0].reason} keeps {connections} open, the first opened at {first}: a library's "
        "own pool, no leak of a test (socket_leaks_libraries=warn)",
        "    ",
    )
    yield from _owner_lines(owners)


def _owner_lines(owners: Sequence[OwnerFinding]) -> Iterator[str]:
    for finding in owners[:_MAX_OWNERS]:
        reason = finding.reason if finding.outcome is not Outcome.LIBRARY_DEFAULT else None
        notes = ", ".join(note for note in (finding.worker, reason) if note)
        yield f"    {finding.owner}" + (f" ({notes})" if notes else "")
    if len(owners) > _MAX_OWNERS:
        yield f"    and {len(owners) - _MAX_OWNERS} more"


def _waiver_lines(findings: Sequence[OwnerFinding]) -> Iterator[str]:
    fixtures = [each for each in findings if each.kind == "fixture" and each.report is not None]
    for finding in findings:
        if finding.outcome is not Outcome.UNUSED_WAIVER:
            continue
        leaking = [each.owner for each in fixtures if _has_opened_in(each, finding.owner)]
        for name in dict.fromkeys(leaking):
            yield (
                f"{finding.owner} is allowed to leak sockets ({finding.reason}), but the leak is "
                f"of {name}, which the marker does not cover: use socket_leaks_ignore = "
                f"fixture:{_plain_name(name)}"
            )
        if not leaking:
            yield (
                f"{finding.owner} is allowed to leak sockets ({finding.reason}) and does not any "
                "more: remove its allow_socket_leaks marker"
            )


def _has_opened_in(finding: OwnerFinding, test: str) -> bool:
    """Whether a fixture has leaked a socket that a test has opened."""
    leaks = finding.report.findings if finding.report is not None else ()
    return any(leak.observation.record.context.get(OPENED_IN) == test for leak in leaks)


def _plain_name(fixture: str) -> str:
    """The name of a fixture without its scope and place, as a pattern has it."""
    quoted = re.match(r"\w+ fixture '([^']+)'", fixture)
    return quoted[1] if quoted is not None else fixture.partition(" ")[0]


def _settle_lines(findings: Sequence[OwnerFinding]) -> Iterator[str]:
    waited = [finding for finding in findings if finding.waited >= _MIN_SETTLE_SHOWN]
    slowest = sorted(waited, key=lambda finding: -finding.waited)[:_MAX_SETTLES]
    if slowest:
        waits = ", ".join(f"{format_duration(each.waited)} {each.owner}" for each in slowest)
        yield f"Slowest to settle: {waits}"


def _not_covered_lines(findings: Sequence[OwnerFinding]) -> Iterator[str]:
    reports = [finding.report for finding in findings if finding.report is not None]
    if reports:
        yield from (line.text for line in not_covered_lines(reports[-1].coverage, layout_of()))


def github_commands(findings: Iterable[OwnerFinding], root: Path) -> Iterator[str]:
    """One command of GitHub Actions for each line that leaks."""
    for site in group_by_site(findings):
        level = _GITHUB_LEVELS.get(site.outcome)
        if level is not None and site.frame is not None:
            path = _checkout_path(site.frame.filename, root)
            yield f"::{level} file={_escape(path, ',:')},line={site.frame.lineno}::{_message(site)}"


def _message(site: Site) -> str:
    sockets = pluralize(len(site.leaks), "socket")
    hint = site.leaks[0].hint
    return _escape(f"{sockets} opened here leaked by {site.describe_owners()}; fix: {hint}")


def _checkout_path(filename: str, root: Path) -> str:
    """Relative to the checkout: GitHub knows no other files."""
    base = os.environ.get("GITHUB_WORKSPACE") or str(root)
    path = relative_path(filename, base)
    return path if path == filename else path.replace("\\", "/")


def _escape(text: str, others: str = "") -> str:
    text = escape_line(text)
    for character in "%\r\n" + others:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def _site_blocks(report: Report, root: Path, *, whole_stacks: bool = False) -> list[str]:
    """The lines of a report that show its leaks; with whole stacks, every call of each."""
    sites = [_block(group, root, whole_stacks=whole_stacks) for group in report.by_site()]
    return [line for site in sites for line in ("", *site)][1:]


def _block(group: SiteGroup, root: Path, *, whole_stacks: bool) -> Iterator[str]:
    record = group.findings[0].observation.record
    # As pytest writes paths, wherever it was started.
    layout = layout_of()._replace(directory=str(root))
    block = describe_site(group, opened_by=_opened_by(record), verbose=whole_stacks)
    if not group.verdict.is_leak and group.verdict is not Verdict.CLOSED_ELSEWHERE:
        # A program may leave it to a pool or a call; a test that has ended may not.
        title = block.title.removeprefix(verdict_name(group.verdict).upper())
        block = block._replace(title=f"NEVER CLOSED{title}")
    yield from (line.text for line in block_lines(block, layout))
    if whole_stacks:
        yield "    the whole stack, innermost call first:"
        for frame in record.opener.stack:
            yield fit_path("      ", layout.relative(frame.place), f" in {frame.function}()")
            if frame.source:
                yield truncate(f"          {frame.source}")


def _opened_by(record: SocketRecord) -> str:
    """Which library has opened the socket, if a test has only called that."""
    site = record.site
    inner = next((each for each in record.blamed.stack if each.kind is not FrameKind.STDLIB), None)
    if site is None or inner is None or inner.kind is not FrameKind.LIBRARY or site is inner:
        return ""
    path = re.split(r"[/\\](?:site|dist)-packages[/\\]", inner.filename)[-1]
    name = re.split(r"[/\\]|\.py$", path)[0]
    with suppress(Exception):
        # Not every library is distributed by its own name.
        name = f"{name} {metadata.version(name)}"
    called = f"{PurePath(site.filename).name}:{site.lineno}"
    return f"by {name} in {path}:{inner.lineno}, called at {called}"


def _change_records(report: Report, change: Callable[[SocketRecord], SocketRecord]) -> Report:
    def changed(record: SocketRecord) -> SocketRecord:
        parent = changed(record.parent) if record.parent is not None else None
        return replace(change(record), parent=parent)

    def changed_leak(leak: Finding) -> Finding:
        observation = replace(leak.observation, record=changed(leak.observation.record))
        return replace(leak, observation=observation)

    return replace(report, findings=tuple(changed_leak(leak) for leak in report.findings))


def _without_pytest_frames(record: SocketRecord) -> SocketRecord:
    calls = enumerate(record.stack)
    outside = next((number for number, frame in calls if _is_call_of_pytest(frame)), 0)
    length = outside
    while length and record.stack[length - 1].kind is not FrameKind.USER:
        length -= 1
    # Tests that were installed with their package look like a library.
    length = length or outside
    return replace(record, stack=record.stack[:length]) if length else record


def _is_call_of_pytest(frame: Frame) -> bool:
    name = frame.function.rpartition(".")[2]
    return name in _CALLS_OF_PYTEST and "/_pytest/" in frame.filename.replace("\\", "/")


def _without_owner(record: SocketRecord) -> SocketRecord:
    context = {name: value for name, value in record.context.items() if name != OPENED_IN}
    return replace(record, context=context)
