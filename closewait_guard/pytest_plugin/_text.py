"""What the plugin prints: errors, their headlines and the summary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from closewait_guard._format import (
    KEY_WIDTH,
    WIDTH,
    Fact,
    Layout,
    block_lines,
    escape_line,
    fit_path,
    format_duration,
    pluralize,
    truncate,
    unique,
)
from closewait_guard._render import describe_site, not_covered_lines, verdict_name
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
    count_leaked,
    format_location,
    group_by_site,
    plain_name,
    relative_path,
    unknown_sentence,
)
from closewait_guard.pytest_plugin._module_variables import find_definition

__all__ = [
    "failure_text",
    "headline",
    "leak_lines",
    "summary_lines",
]

_MAX_PLACES = 3
_MAX_OWNERS = 3
_MAX_SETTLES = 3
_MIN_SETTLE_SHOWN = 0.05
# Narrower lines cannot hold an address and a code; wider ones are hard to read.
_MIN_WIDTH, _MAX_WIDTH = 60, 120

# Where pytest calls a test, a doctest or a fixture.
_CALLS_OF_PYTEST = frozenset(
    {"pytest_pyfunc_call", "runtest", "call_fixture_func", "_teardown_yield_fixture"}
)

# With what was leaked, and by how many.
_OUTCOME_PHRASES = {
    Outcome.FAILED: "{} leaked by {}",
    Outcome.WARNED: "{} leaked by {} (socket_leaks=warn)",
    Outcome.STILL_RUNNING: (
        "{} left to a running thread, process, loop or record by {} (socket_leaks_threads=warn)"
    ),
    Outcome.KNOWN: "{} leaked by {}, known (socket_leaks_baseline)",
    Outcome.ALLOWED: "{}, allowed ({})",
}
_ENDS = {
    Verdict.DROPPED: " (dropped)",
    Verdict.LINGERING: " (lingering)",
    Verdict.CLOSED_ELSEWHERE: " (closed elsewhere)",
    Verdict.CHECKED_OUT: " (not given back)",
}
# What a holder ends with where that is an object of a library.
_CLIENT = re.compile(r": ((?:\w+\.)+[A-Z]\w*)(?=$|;| \()")
_GLOBAL = " (module global)"
_NO_OWN_LINE = "; no line of your code on the stack"
# In a test what holds the socket says more than how to close one.
_KEYS = ("opened", "taken", "held by", "fix")


def failure_text(
    finding: OwnerFinding, root: Path, *, width: int = WIDTH, whole_stacks: bool = False
) -> str:
    """What the test's error shows: how many, and the blocks of the report."""
    report = finding.report
    if report is None:
        return ""
    # The title names the owner, and every stack of a test ends with calls of pytest.
    shown = _change_records(report, _without_owner)
    if not whole_stacks:
        shown = _change_records(shown, _without_pytest_frames)
    layout = _layout(root, width)
    blocks = _site_blocks(shown, layout, finding.owner, whole_stacks=whole_stacks)
    head = layout.wrap(_head(finding, report), "  ")
    defined = f"defined at {finding.defined_at}" if finding.defined_at is not None else None
    notes = [layout.wrap(f"  {each}", "  ") for each in (defined, finding.reason) if each]
    return "\n".join([*head, *(line for lines in notes for line in lines), "", *blocks])


def _head(finding: OwnerFinding, report: Report) -> str:
    """How many sockets, and what became of them."""
    number = len(report.findings)
    if not number:
        return f"leaks of {finding.owner} unknown"
    dropped = sum(each.is_gone for each in report.findings)
    waited = ""
    if finding.waited >= _MIN_SETTLE_SHOWN:
        waited = f"{format_duration(finding.waited)} "
    when = {"test": f"{waited}after the test", "fixture": f"{waited}after its teardown"}
    ends = {
        f"still open {when.get(finding.kind, 'at the end of the run')}": number - dropped,
        "garbage-collected while open": dropped,
    }
    found = {end: count for end, count in ends.items() if count}
    what = ", ".join(end if len(found) == 1 else f"{each} {end}" for end, each in found.items())
    return f"{_who(finding)}leaked {count_leaked(report.findings)} ({what})"


def _who(finding: OwnerFinding) -> str:
    """A fixture. The test is named by pytest, where it shows what is said of it."""
    return "" if finding.kind == "test" else f"{finding.owner} "


def headline(finding: OwnerFinding, root: Path) -> str:
    """The one line of it in pytest's short summary, which may be cut: places come first."""
    if finding.report is None:
        return ""
    found = group_by_site([finding], root)
    places = unique(
        f"{_short_location(site.frame, finding, root)}{_describe_end(site.leaks[0])}"
        for site in found
    )
    if len(places) > _MAX_PLACES:
        more = pluralize(len(places) - _MAX_PLACES, "more line")
        places = [*places[:_MAX_PLACES], more]
    leaked = f"leaked {count_leaked(finding.report.findings)}"
    if finding.kind == "test":
        return escape_line(f"{', '.join(places)}: {leaked}")
    who = finding.owner
    if finding.defined_at is not None:
        name = f"{finding.kind} {plain_name(finding.owner)!r}"
        who = f"{_without_folders(finding.defined_at)} {name}"
    return escape_line(f"{who} {leaked}: {', '.join(places)}")


def _describe_end(leak: Finding) -> str:
    """What comes after the line: which client was not closed, or what is special of a socket."""
    if (owner := leak.observation.owner) is not None:
        return f" ({owner.name} never closed)"
    for holder in leak.holders:
        if leak.verdict not in _ENDS and (client := _CLIENT.search(holder)):
            return f" ({client[1]} never closed)"
    return _ENDS.get(leak.verdict, "")


def _short_location(frame: Frame | None, finding: OwnerFinding, root: Path) -> str:
    """Without folders, and without the file of the test itself: pytest cuts its line at the end."""
    if frame is None:
        return format_location(frame, root)
    file = finding.nodeid.partition("::")[0]
    if finding.kind == "test" and relative_path(frame.filename, root).replace("\\", "/") == file:
        return f"line {frame.lineno}"
    return _without_folders(f"{frame.filename}:{frame.lineno}")


def _without_folders(place: str) -> str:
    return PurePath(place).name


def summary_lines(
    findings: Sequence[OwnerFinding], root: Path, *, width: int = WIDTH, whole_stacks: bool = False
) -> list[str]:
    """The lines of the section; none when there is nothing to report."""
    lines: list[str] = []
    layout = _layout(root, width)
    in_defaults = [each for each in findings if each.outcome is Outcome.LIBRARY_DEFAULT]
    # Known leaks may be many: how many is said at the end.
    apart = {Outcome.LIBRARY_DEFAULT} | (set() if whole_stacks else {Outcome.KNOWN})
    for site in group_by_site((each for each in findings if each.outcome not in apart), root):
        lines += [*_site_lines(site, root, layout, whole_stacks=whole_stacks), ""]
    for variable in dict.fromkeys(each.reason for each in in_defaults):
        owners = [each for each in in_defaults if each.reason == variable]
        lines += [*_default_lines(owners, root, layout), ""]
    unknown = [unknown_sentence(each) for each in findings if each.is_unknown]
    for sentence in (*unknown, *_waiver_sentences(findings)):
        lines += [*layout.wrap(sentence, "    "), ""]
    if lines:
        lines += _settle_lines(findings, layout) if whole_stacks else ()
        lines += _not_covered_lines(findings, layout)
    return [escape_line(line) for line in (lines if lines and lines[-1] else lines[:-1])]


def _site_lines(site: Site, root: Path, layout: Layout, *, whole_stacks: bool) -> Iterator[str]:
    kinds = Counter(finding.kind for finding in site.owners)
    by = " and ".join(pluralize(number, kind) for kind, number in kinds.items())
    said = _OUTCOME_PHRASES[site.outcome].format(_count_sockets(site.leaks), by)
    yield from layout.wrap(f"{format_location(site.frame, root)}: {said}", "    ")
    if not whole_stacks and (site.outcome is Outcome.WARNED or site.owners[0].has_failed_already):
        # No error of ours says so.
        yield from layout.wrap(f"fix: {site.leaks[0].hint}", " " * 9, "    ")
    yield from _owner_lines(site.owners, root)
    first = site.owners[0].report
    if whole_stacks and first is not None:
        report = replace(first, findings=site.leaks)
        narrower = layout._replace(width=layout.width - 2)
        yield from ("  " + line for line in _site_blocks(report, narrower, whole_stacks=True))


def _count_sockets(leaks: Sequence[Finding]) -> str:
    """How many, and of what kind, where they were not just left open."""
    kind = f"{leaks[0].verdict.replace('_', ' ')} " if leaks[0].verdict in _REMARKABLE else ""
    return count_leaked(leaks, kind)


# A socket of these was not just left open.
_REMARKABLE = (
    Verdict.DEAD,
    Verdict.DROPPED,
    Verdict.LINGERING,
    Verdict.INHERITED,
    Verdict.CLOSED_ELSEWHERE,
)


def _default_lines(owners: list[OwnerFinding], root: Path, layout: Layout) -> Iterator[str]:
    """One paragraph for each variable of a library, however many tests have used its pool."""
    leaks = [leak for each in owners if each.report is not None for leak in each.report.findings]
    first = format_location(leaks[0].observation.record.site, root)
    connections = pluralize(len(leaks), "connection")
    yield from layout.wrap(
        f"{owners[0].reason} keeps {connections} open, the first opened at {first}: a library's "
        "own pool, no leak of a test (socket_leaks_libraries=warn)",
        "    ",
    )
    yield from _owner_lines(owners, root)


def _owner_lines(owners: Sequence[OwnerFinding], root: Path) -> Iterator[str]:
    for finding in owners[:_MAX_OWNERS]:
        reason = finding.reason if finding.outcome is not Outcome.LIBRARY_DEFAULT else None
        place = relative_path(finding.defined_at, root) if finding.defined_at is not None else None
        notes = ", ".join(note for note in (place, finding.worker, reason) if note)
        yield f"    {finding.owner}" + (f" ({notes})" if notes else "")
    if len(owners) > _MAX_OWNERS:
        yield f"    and {len(owners) - _MAX_OWNERS} more"


def _waiver_sentences(findings: Sequence[OwnerFinding]) -> Iterator[str]:
    fixtures = [each for each in findings if each.kind == "fixture" and each.report is not None]
    for finding in findings:
        if finding.outcome is not Outcome.UNUSED_WAIVER:
            continue
        leaking = [each.owner for each in fixtures if _has_opened_in(each, finding.owner)]
        for name in dict.fromkeys(leaking):
            yield (
                f"{finding.owner} is allowed to leak sockets ({finding.reason}), but the leak is "
                f"of {name}, which the marker does not cover: use socket_leaks_ignore = "
                f"fixture:{plain_name(name)}"
            )
        if not leaking:
            yield (
                f"{finding.owner} no longer leaks: remove its marker allow_socket_leaks "
                f"({finding.reason})"
            )


def _has_opened_in(finding: OwnerFinding, test: str) -> bool:
    """Whether a fixture has leaked a socket that a test has opened."""
    leaks = finding.report.findings if finding.report is not None else ()
    return any(leak.observation.record.context.get(OPENED_IN) == test for leak in leaks)


def _settle_lines(findings: Sequence[OwnerFinding], layout: Layout) -> Iterator[str]:
    waited = [finding for finding in findings if finding.waited >= _MIN_SETTLE_SHOWN]
    slowest = sorted(waited, key=lambda finding: -finding.waited)[:_MAX_SETTLES]
    if slowest:
        waits = ", ".join(f"{format_duration(each.waited)} {each.owner}" for each in slowest)
        yield from layout.wrap(f"Slowest to settle: {waits}", "    ")


def _not_covered_lines(findings: Sequence[OwnerFinding], layout: Layout) -> Iterator[str]:
    reports = [finding.report for finding in findings if finding.report is not None]
    if reports:
        # What was open before the first test is no test's.
        coverage = replace(reports[-1].coverage, adopted=0)
        yield from (line.text for line in not_covered_lines(coverage, layout))


def _layout(root: Path, width: int) -> Layout:
    """Paths as pytest writes them, wherever it was started; lines as long as pytest's."""
    return Layout(min(max(width, _MIN_WIDTH), _MAX_WIDTH), str(root), indent=2)


def _site_blocks(
    report: Report, layout: Layout, owner: str = "", *, whole_stacks: bool = False
) -> list[str]:
    """The lines of a report that show its leaks; with whole stacks, every call of each."""
    groups = report.by_site()
    sites = [leak_lines(group, layout, owner, whole_stacks=whole_stacks) for group in groups]
    return [line for site in sites for line in ("", *site)][1:]


def leak_lines(
    group: SiteGroup, layout: Layout, owner: str = "", *, whole_stacks: bool = False
) -> Iterator[str]:
    """The block of one site."""
    record = group.findings[0].observation.record
    block = describe_site(group, library_line=_library_line(record), verbose=whole_stacks)
    title = block.title
    if not group.verdict.is_leak and group.verdict is not Verdict.CLOSED_ELSEWHERE:
        # A program may leave it to a pool or a call; a test that has ended may not.
        end = "NOT GIVEN BACK" if group.verdict is Verdict.CHECKED_OUT else "NEVER CLOSED"
        title = f"{end}{title.removeprefix(verdict_name(group.verdict).upper())}"
    facts = [said for fact in block.facts for said in _for_a_test(fact, owner, layout)]
    order = {key: place for place, key in enumerate(_KEYS)}
    facts.sort(key=lambda fact: order.get(fact.key, len(order)))
    # All that a test leaks fails it, whatever it would mean to a program.
    shown = block._replace(
        sockets=group.count if group.count > 1 else None,
        title=title,
        severity=None,
        facts=tuple(each for each in facts if whole_stacks or not _is_task(each)),
    )
    yield from (line.text for line in block_lines(shown, layout))
    if whole_stacks:
        yield "  the whole stack, innermost call first:"
        for frame in record.opener.stack:
            place = layout.relative(frame.place)
            yield fit_path("    ", place, f" in {frame.function}()", layout.width)
            if frame.source:
                yield truncate(f"        {frame.source}", layout.width)


def _for_a_test(fact: Fact, owner: str, layout: Layout) -> Iterator[Fact]:
    """Say which test it was where no line does, and where a global variable is defined."""
    if owner and fact.text.endswith(_NO_OWN_LINE):
        fact = fact._replace(text=f"{fact.text.removesuffix(_NO_OWN_LINE)}, by {owner}")
    variable, is_global, rest = fact.text.partition(_GLOBAL)
    place = find_definition(variable) if is_global and fact.key == "held by" else None
    if place is None:
        yield fact
        return
    where = layout.relative(f"<- defined at {_path_in_library(place[0])}:{place[1]}")
    both = f"{variable}{rest}  {where}"
    is_short = len(both) + layout.indent + KEY_WIDTH <= layout.width
    for text in [both] if is_short else [f"{variable}{rest}", where]:
        yield fact._replace(text=text)


def _is_task(fact: Fact) -> bool:
    """Whether it only names the task of a library, beside the line that awaits it."""
    return fact.key == "context" and re.fullmatch(r"task [^ ,]+", fact.text) is not None


def _library_line(record: SocketRecord) -> str:
    """The line of a library that has opened the socket."""
    inner = next((each for each in record.blamed.stack if each.kind is not FrameKind.STDLIB), None)
    if inner is None or inner.kind is not FrameKind.LIBRARY:
        return ""
    return f"{_path_in_library(inner.filename)}:{inner.lineno}"


def _path_in_library(filename: str) -> str:
    """From its package on; other paths as they are."""
    return re.split(r"[/\\](?:site|dist)-packages[/\\]", filename)[-1]


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
