"""Render a report as text. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from closewait_guard._enums import NOT_INSTALLED, SURPLUS_CLIENTS
from closewait_guard._format import (
    Layout,
    Section,
    Style,
    StyledLine,
    block_lines,
    escape_line,
    fit_path,
    format_duration_range,
    format_time,
    join_counts,
    page_of,
    pluralize,
    unique,
)
from closewait_guard._render.descriptors import (
    descriptor_kinds,
    fd_numbers,
    has_descriptor_alert,
    is_fd_share_news,
    open_at_end_lines,
)
from closewait_guard._render.site import codes_of, describe_site, places_of, verdict_name
from closewait_guard.model import (
    Alert,
    AlertStatus,
    ClosedLate,
    Coverage,
    Finding,
    Report,
    Severity,
    SiteGroup,
    Verdict,
)

__all__ = [
    "Scope",
    "alert_lines",
    "closed_late_lines",
    "codes_lines",
    "is_quiet",
    "join_sections",
    "native_note",
    "no_news_line",
    "not_covered",
    "not_covered_lines",
    "package_totals",
    "program_name",
    "render_report",
    "scope_of",
    "sections",
    "sections_in",
    "shows_block",
    "totals",
]


# Nothing to do about them while they are few: one line for all.
_QUIET = {
    Verdict.STALE_POOL: "idle pooled {connections} closed by the server",
    Verdict.HALF_CLOSED: "half-closed {connections}",
    Verdict.CLOSING: "closing {connections}",
    Verdict.UNANSWERED: "{connections} from a peer that does not answer",
}


# From so many places on, leaks are added up by package.
_FEWEST_PLACES = 3
_MAX_PACKAGES = 5


class Scope(NamedTuple):
    """Of which processes a report is.

    Attributes:
        who: The processes, and where they run.
        where: In which of them there are leaks.
        descriptors: How many descriptors were in use, of how many.
        kinds: What they are.
        is_descriptors_news: Whether they are so many, or so unknown, that it is worth a sentence.
        where_of: In which of them the sockets of a site are.
        is_complete: Whether all processes that may have leaked are among them.
    """

    who: str
    where: str
    descriptors: str
    kinds: str
    is_descriptors_news: bool
    where_of: Callable[[SiteGroup], str]
    is_complete: bool = True


def render_report(report: Report, layout: Layout | None = None) -> str:
    """Render a report: the counts, a block for each cause, worst first, and what is not covered."""
    return join_sections(sections(report, layout or Layout()))


def join_sections(found: Iterable[Section]) -> str:
    return "\n\n".join("\n".join(line.text for line in each.lines) for each in found) + "\n"


def sections(report: Report, layout: Layout) -> list[Section]:
    """The sections of a report: counts, blocks, sockets closed late, what is not covered."""
    return sections_in(report, layout, scope_of(report))


def scope_of(report: Report) -> Scope:
    """That it is of one process."""
    who = f"pid {report.pid}" + (f" on {report.host}" if report.host else "")
    numbers, kinds = fd_numbers(report), descriptor_kinds(report)
    return Scope(who, "", numbers, kinds, is_fd_share_news(report), lambda _: "")


def sections_in(report: Report, layout: Layout, scope: Scope) -> list[Section]:
    """The same of a report of several processes."""
    groups = [group for group in report.by_site() if shows_block(group, layout)]
    not_covered = not_covered_lines(report.coverage, layout)
    open_at_end = open_at_end_lines(report.open_at_end, layout)
    if not (groups or report.alerts or report.closed_late or report.omitted):
        return [Section([*_one_line(report, layout, scope), *open_at_end, *not_covered])]
    found = [Section(list(_head_lines(report, groups, layout, scope)))]
    digits = max((len(f"{group.count:,}") for group in groups), default=0)
    for place, group in enumerate(groups, 1):
        number = f"[{place}]".ljust(len(f"[{len(groups)}]"))
        block = describe_site(group, scope.where_of(group), verbose=layout.verbose)
        found.append(Section(list(block_lines(block, layout, number, digits)), group))
    codes = [code for group in groups for code in codes_of(group)]
    codes += [alert.code for alert in report.alerts]
    codes += {SURPLUS_CLIENTS} & {finding.code for finding in report.findings}
    tail = [*closed_late_lines(report.closed_late, layout)]
    tail += [StyledLine(text, Style.NOTE) for text in _quiet_lines(report, layout)]
    tail += [*open_at_end, *not_covered, *codes_lines(codes)]
    return [*found, *([Section(tail)] if tail else [])]


def shows_block(group: SiteGroup, layout: Layout) -> bool:
    """Whether a group is worth a block, and not only a place in the line for all the others."""
    return layout.everything or not is_quiet(group.verdict, group.severity)


def is_quiet(verdict: Verdict, severity: Severity) -> bool:
    """Whether there is nothing to do about such sockets while they are few."""
    return verdict in _QUIET and severity is Severity.INFO


# The first lines, or the only one.


def _head_lines(
    report: Report, groups: Sequence[SiteGroup], layout: Layout, scope: Scope
) -> Iterator[StyledLine]:
    about = escape_line(f"({scope.who}, {format_time(report.taken_at, ' %Z')})")
    program = program_name(report.command, layout)
    name = fit_path("closewait-guard  ", program, "", layout.width)
    fits = len(name) + 2 + len(about) <= layout.width
    for text in [f"{name}  {about}"] if fits else [name, *layout.wrap(about, "  ", "  ")]:
        yield StyledLine(text, Style.NOTE)
    sentences = list(totals(report, groups, scope))
    has_kinds = layout.verbose or has_descriptor_alert(report)
    if has_kinds or scope.is_descriptors_news:
        kinds = f": {scope.kinds}" if has_kinds and scope.kinds else ""
        sentences.append(f"File descriptors: {scope.descriptors}{kinds}.")
    for text in (*_pack(sentences, layout), *_pack(package_totals(groups), layout, "  ", " ")):
        yield StyledLine(text, Style.TITLE)
    for alert in report.alerts:
        yield from alert_lines(alert, layout)


def _pack(
    sentences: Iterable[str], layout: Layout, indent: str = "", between: str = "  "
) -> list[str]:
    """Sentences side by side as long as they fit, so that none is folded without need.

    Args:
        sentences: What to put there.
        layout: The width.
        indent: What each line but the first begins with.
        between: What stands between two on one line.
    """
    lines: list[str] = []
    for sentence in sentences:
        if lines and len(lines[-1]) + len(between) + len(sentence) <= layout.width:
            lines[-1] += f"{between}{sentence}"
        else:
            lines.append(f"{indent}{sentence}" if lines else sentence)
    return [text for line in lines for text in layout.wrap(line, "  ")]


def totals(report: Report, groups: Sequence[SiteGroup], scope: Scope) -> Iterator[str]:
    """How many leaks there are of how many causes, and what else there is."""
    leaks = [group for group in groups if group.verdict.is_leak]
    if leaks:
        yield f"{count_leaks(leaks)} from {places_of(leaks)}{scope.where}."
    elif any(group.verdict in _NO_ALL_CLEAR for group in groups):
        pass
    elif report.omitted:
        yield f"Nothing new{scope.where}."
    else:
        yield f"{'No leaks' if scope.is_complete else _UNKNOWN}{scope.where}."
    for verdict in _NEITHER:
        count = sum(group.count for group in groups if group.verdict is verdict)
        if count:
            yield f"{pluralize(count, 'socket')} {verdict_name(verdict)}."
    if report.omitted:
        yield f"{pluralize(report.omitted, 'leak')} left out."


def count_leaks(groups: Sequence[SiteGroup]) -> str:
    """How many sockets have leaked, and how many owners of sockets were not closed."""
    unclosed = sum(group.count for group in groups if group.verdict in _OWNERS)
    leaked = sum(group.count for group in groups) - unclosed
    return join_counts({"leaked socket": leaked, "unclosed object": unclosed})


_OWNERS = (Verdict.UNCLOSED, Verdict.SURPLUS)
# What is counted on its own: no leak, or none for certain.
_NEITHER = (
    Verdict.OPEN,
    Verdict.CLOSED_ELSEWHERE,
    Verdict.CHECKED_OUT,
    Verdict.UNANSWERED,
    Verdict.IDLE_OR_LEAKED,
)
# What is open is a finding only of a block or a test that should have closed it.
_NO_ALL_CLEAR = (Verdict.OPEN, Verdict.IDLE_OR_LEAKED)
_UNKNOWN = "Leaks unknown in some processes; none found"


def package_totals(groups: Sequence[SiteGroup]) -> list[str]:
    """How many leaks are whose, in phrases, where there are so many sites that one would add up."""
    leaks = [group for group in groups if group.verdict.is_leak]
    if len(leaks) < _FEWEST_PLACES:
        return []
    counts = _count(leaks, lambda each: each.caller or each.package)
    if len(counts) == 1:
        # All of one package of the program: by the library that it has called.
        counts = _count(leaks, lambda each: each.via or each.package)
    if len(counts) == 1:
        return []
    shown = counts.most_common(_MAX_PACKAGES)
    others = counts.total() - sum(count for _, count in shown)
    shown += [("others", others)] if others else []
    *parts, last = [f"{package or 'unknown'} {count:,}" for package, count in shown]
    return ["By package:", *(f"{part}," for part in parts), f"{last}."]


def _count(groups: Iterable[SiteGroup], package_of: Callable[[Finding], str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for group in groups:
        # One number beside another would be hard to read: without the version.
        counts[package_of(group.findings[0]).partition(" ")[0]] += group.count
    return counts


def _one_line(report: Report, layout: Layout, scope: Scope) -> Iterator[StyledLine]:
    """That there is no leak, or that it is not known."""
    found = "no leaks" if scope.is_complete else _UNKNOWN.lower()
    yield from _summary_line(report, layout, scope, found)


def no_news_line(report: Report, layout: Layout) -> str:
    """That nothing has changed since the report before, for a log of many reports."""
    leaks = [group for group in report.by_site() if group.verdict.is_leak]
    found = f"{count_leaks(leaks)} from {places_of(leaks)}, nothing new"
    lines = _summary_line(report, layout, scope_of(report), found if leaks else "no leaks")
    return "".join(f"{line.text}\n" for line in lines)


def _summary_line(report: Report, layout: Layout, scope: Scope, found: str) -> Iterator[StyledLine]:
    sockets = report.open_sockets + (report.coverage.native or 0)
    parts = [pluralize(sockets, "socket"), *_quiet_parts(_quiet_counts(report, layout))]
    parts.append(f"fds {scope.descriptors.partition(' (')[0]}")
    # Where there are several processes, or one of several, that has been said.
    who = "" if scope.where else f"{scope.who.partition(' on ')[0]} "
    program = program_name(report.command, layout)
    counts = f"({', '.join(parts)})"
    phrases = [f"closewait-guard: {found}{scope.where} {counts}", f"{who}{program}"]
    if len(phrases[0]) > layout.width:
        phrases[:1] = [phrases[0].removesuffix(f" {counts}"), counts]
    for line in _pack(filter(None, phrases), layout, "  "):
        yield StyledLine(line, Style.TITLE)


def program_name(command: str, layout: Layout) -> str:
    """The program, without the directory where that says nothing."""
    if command in ("-c", "-m", "-"):
        return f"python {command}"
    parts = command.replace("\\", "/").rsplit("/", 2)
    if len(parts) > 1 and parts[-1] == "__main__.py":
        return f"python -m {escape_line(parts[-2])}"
    is_installed = len(parts) > 1 and parts[-2] in ("bin", "Scripts")
    return escape_line(parts[-1] if is_installed else layout.relative(command))


# Alerts, and what has ended.


def alert_lines(alert: Alert, layout: Layout) -> Iterator[StyledLine]:
    """One alert in a sentence, with its code and severity."""
    is_over = alert.status is AlertStatus.RESOLVED
    kind = alert.kind.replace("_", " ")
    label = f"RESOLVED  {kind}:" if is_over else f"{kind.upper()} "
    notes = [alert.code] if alert.code else []
    if not is_over:
        notes.append(alert.severity.value)
    text = f"{label} {alert.message}" + (f"  ({', '.join(notes)})" if notes else "")
    style = Style.NOTE if is_over else Style(alert.severity.value)
    for line in layout.wrap(text, "  "):
        yield StyledLine(line, style)


def closed_late_lines(closed: Sequence[ClosedLate], layout: Layout) -> Iterator[StyledLine]:
    """One paragraph for each site."""
    for (end, place), group in groupby(sorted(closed, key=_end_and_place), key=_end_and_place):
        members = list(group)
        durations = [each.after for each in members]
        at_least = any(each.finding.observation.is_lower_bound for each in members)
        after = format_duration_range(min(durations), max(durations), at_least=at_least)
        count = pluralize(sum(each.finding.count for each in members), "socket")
        code = members[0].finding.code
        text = f"{end}, after {after}: {count} {place}"
        for line in layout.wrap(f"{text}  ({code})" if code else text, "  "):
            yield StyledLine(line, Style.NOTE)


def _end_and_place(closed: ClosedLate) -> tuple[str, str]:
    """What has ended late, and where that had begun."""
    finding = closed.finding
    site = finding.observation.record.site
    place = site.place if site is not None else "an unknown place"
    if finding.verdict is Verdict.CHECKED_OUT:
        return "GIVEN BACK LATE", f"checked out at {place}"
    return "CLOSED LATE", f"opened at {place}"


# What has no block, and what is not covered.


def _quiet_parts(counts: Counter[str]) -> Iterator[str]:
    for what, number in counts.items():
        connections = "connection" if number == 1 else "connections"
        yield f"{number:,} {what.format(connections=connections)}"


def _quiet_counts(report: Report, layout: Layout) -> Counter[str]:
    """How many findings have no block, by what they are."""
    counts = Counter(dict.fromkeys(_QUIET.values(), 0))
    for group in report.by_site():
        if not shows_block(group, layout):
            place = layout.relative(group.site.place) if group.site else "its line"
            for each in group.findings:
                is_surplus = each.code == SURPLUS_CLIENTS
                counts[_surplus_at(place) if is_surplus else _QUIET[each.verdict]] += each.count
    return +counts


def _surplus_at(place: str) -> str:
    # A file may have any name, and this is a template.
    place = escape_line(place).replace("{", "{{").replace("}", "}}")
    return f"{_QUIET[Verdict.STALE_POOL]}, of more clients than {place} needs"


def _quiet_lines(report: Report, layout: Layout) -> list[str]:
    counts = _quiet_counts(report, layout)
    are_none = "not a leak" if counts.total() == 1 else "not leaks"
    parts = ", ".join(_quiet_parts(counts))
    return layout.wrap(f"{parts} ({are_none}).", "  ") if parts else []


def native_note(coverage: Coverage) -> str:
    """What is not known of the sockets of C extensions: where those that are open were opened."""
    if coverage.native is None:
        return (
            "sockets that C extensions (libuv, libpq, libcurl, grpc) may have open, because the "
            "descriptors could not be listed"
        )
    earlier = min(coverage.earlier, coverage.native)
    later = coverage.native - coverage.attributed - earlier
    parts = []
    if earlier:
        parts.append(
            f"where {_without_object(earlier)} opened before install() (inherited when "
            "the program started, or opened by C extensions)"
        )
    if later > 0:
        parts.append(
            f"where {_without_object(later)} opened (by C extensions, see attribute(), or in "
            "another process)"
        )
    return "; ".join(parts)


def _without_object(number: int) -> str:
    which = f"{pluralize(number, 'socket')} without a socket object"
    return f"{which} {'was' if number == 1 else 'were'}"


def not_covered(coverage: Coverage) -> list[str]:
    """A phrase for each thing that is known to be missing."""
    notes = [note for note in coverage.notes if note]
    if coverage.adopted and NOT_INSTALLED not in notes:
        notes.append(
            f"the stack of {pluralize(coverage.adopted, 'socket')} opened before install()"
        )
    if coverage.forgotten:
        notes.append(
            f"where {coverage.forgotten:,} of {coverage.dropped:,} dropped sockets were opened, "
            "whose records had to make room"
        )
    if coverage.failures:
        is_one = coverage.failures == 1
        what = "opening or end of a socket" if is_one else "openings or ends of sockets"
        notes.append(f"{coverage.failures:,} {what} that could not be recorded")
    return notes


def not_covered_lines(coverage: Coverage, layout: Layout) -> list[StyledLine]:
    """The paragraph on what is not covered; empty where nothing is known to be missing."""
    notes = not_covered(coverage)
    if not notes:
        return []
    return [
        StyledLine(text, Style.NOTE)
        for text in layout.wrap(f"Not covered: {'; '.join(notes)}.", "  ")
    ]


def codes_lines(codes: Iterable[str]) -> Iterator[StyledLine]:
    """The address of the page that explains them."""
    found = unique(filter(None, codes))
    if found:
        address = page_of(found[0] if len(found) == 1 else "")
        yield StyledLine(escape_line(f"Codes: {address}"), Style.NOTE)
