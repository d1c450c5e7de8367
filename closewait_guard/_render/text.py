"""Render a report as plain text, 80 columns wide. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from closewait_guard._format import (
    format_duration_range,
    format_time,
    pluralize,
    truncate,
    wrap_text,
)
from closewait_guard._render.site import site_lines, verdict_name
from closewait_guard.model import (
    Alert,
    AlertStatus,
    ClosedLate,
    Coverage,
    Report,
    Severity,
    SiteGroup,
    Verdict,
)

__all__ = [
    "Section",
    "alert_lines",
    "coverage_lines",
    "descriptors_used",
    "headline_lines",
    "native_note",
    "render_text",
    "render_with_header",
    "sections",
    "sections_with_header",
]


class Section(NamedTuple):
    """Lines that belong together, with their severity and the site that they describe."""

    severity: Severity | None
    lines: list[str]
    group: SiteGroup | None = None


def render_text(report: Report) -> str:
    """Render a report: the counts, a section for each site, worst first, and what is not covered.

    Example:
        >>> from closewait_guard import scan
        >>> print(render_text(scan()))  # doctest: +ELLIPSIS
        closewait_guard: ... of ... open sockets; ... descriptors in use...
        <BLANKLINE>
        Cannot see: ...
    """
    return "\n\n".join("\n".join(section.lines) for section in sections(report)) + "\n"


def render_with_header(report: Report) -> str:
    """Render a report below a line with its time and process, for a log of many reports."""
    return f"{_header_line(report)}\n{render_text(report)}\n"


def sections_with_header(report: Report) -> Iterator[Section]:
    """The sections of a report, after one with its time and process."""
    yield Section(None, [_header_line(report)])
    yield from sections(report)


def _header_line(report: Report) -> str:
    process = f"process {report.pid} on {report.host}"
    return truncate(f"== {format_time(report.taken_at)}  {process}: {report.command}")


def sections(report: Report) -> Iterator[Section]:
    """The sections of a report: counts, alerts, sites, sockets closed late, coverage."""
    yield Section(None, _headline_lines(report))
    for alert in report.alerts:
        yield Section(alert.severity, alert_lines(alert))
    for group in report.by_site():
        yield Section(group.severity, list(site_lines(group)), group)
    if report.closed_late:
        yield Section(None, list(_closed_late_lines(report.closed_late)))
    yield Section(None, coverage_lines(report.coverage))


def _headline_lines(report: Report) -> list[str]:
    return headline_lines(report, "", descriptors_used(report))


def headline_lines(
    report: Report, where: str, descriptors: str, *, is_complete: bool = True
) -> list[str]:
    """The counts of a report, with where it was made and how many descriptors were in use.

    If it is not complete, that there is no leak is not known.
    """
    verdicts: Counter[Verdict] = Counter()
    not_open = 0
    for finding in report.findings:
        verdicts[finding.verdict] += finding.count
        not_open += finding.count * (finding.closed_at_exit or finding.verdict in _NOT_OPEN)
    counts = [
        f"{verdicts[verdict]} {verdict_name(verdict)}" for verdict in Verdict if verdicts[verdict]
    ]
    if report.omitted:
        counts.append(f"{report.omitted:,} left out")
    found = ", ".join(counts) or ("no leak" if is_complete else "none found")
    if not is_complete and not report.leaks:
        found = f"leaks unknown in some processes; {found}"
    sockets = _all_sockets(report, not_open)
    return wrap_text(f"closewait_guard: {found} of {sockets}{where}; {descriptors}", "  ")


_NOT_OPEN = (Verdict.DROPPED, Verdict.CLOSED_ELSEWHERE)


def _all_sockets(report: Report, not_open: int) -> str:
    """All that the findings are of, with the sockets of native code and those that are gone."""
    still_open = report.open_sockets + (report.coverage.native or 0)
    if not not_open:
        return pluralize(still_open, "open socket")
    return f"{pluralize(still_open + not_open, 'socket')}, {still_open:,} of them open"


def descriptors_used(report: Report) -> str:
    """How many descriptors there were, of how many."""
    used, limit = report.fd_used, report.fd_limit
    if used is None:
        return "descriptors in use unknown"
    if not limit:
        return f"{used:,} descriptors in use"
    return f"{used:,} of {limit:,} descriptors in use ({used / limit:.0%})"


def alert_lines(alert: Alert) -> list[str]:
    """One alert in a sentence."""
    if alert.status is AlertStatus.RESOLVED:
        return wrap_text(f"RESOLVED  {alert.kind.upper()}: no longer so: {alert.message}", "  ")
    return wrap_text(f"{alert.severity.upper()}  {alert.kind.upper()}: {alert.message}", "  ")


def _closed_late_lines(closed: tuple[ClosedLate, ...]) -> Iterator[str]:
    """One paragraph for each site."""
    for place, group in groupby(sorted(closed, key=_place), key=_place):
        members = list(group)
        durations = [each.after for each in members]
        at_least = any(each.finding.observation.is_lower_bound for each in members)
        after = format_duration_range(min(durations), max(durations), at_least=at_least)
        what = (
            f"{pluralize(sum(each.finding.count for each in members), 'socket')} opened at {place}"
        )
        yield from wrap_text(f"CLOSED LATE, after {after}: {what}", "  ")


def _place(closed: ClosedLate) -> str:
    site = closed.finding.observation.record.site
    return site.place if site is not None else "an unknown place"


_NATIVE = "native code (libuv, libpq, libcurl, grpc) or _socket"


def native_note(count: int | None) -> str:
    """What is not known of the sockets of native code, of which so many are open."""
    if count is None:
        return f"sockets that {_NATIVE} opens"
    return f"where {_NATIVE} opens sockets: {count:,} such are open"


def coverage_lines(coverage: Coverage) -> list[str]:
    """The paragraph on what is not covered."""
    notes = list(coverage.notes)
    if coverage.adopted:
        notes.append(
            f"the creation of {pluralize(coverage.adopted, 'socket')} older than the guard"
        )
    if coverage.forgotten:
        notes.append(
            f"the creations of {coverage.forgotten:,} of {coverage.dropped:,} dropped sockets, "
            "whose records had to make room"
        )
    if coverage.failures:
        notes.append(f"{coverage.failures:,} creations or ends that failed to be recorded")
    return wrap_text(f"Cannot see: {'; '.join(notes)}.", "  ")
