"""A report as plain text, 80 columns wide: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from closewait_guard._format import date, format_duration_range, pluralize, truncate, wrap_text
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
    "render_text",
    "render_with_header",
    "sections",
    "sections_with_header",
]


class Section(NamedTuple):
    """Some lines that belong together, and how bad what they tell is."""

    severity: Severity | None
    lines: list[str]
    group: SiteGroup | None = None


def render_text(report: Report) -> str:
    """Tell a report: the counts, one block for each site, worst first, and what cannot be seen.

    Example:
        >>> from closewait_guard import scan
        >>> print(render_text(scan()))  # doctest: +ELLIPSIS
        closewait_guard: ... of ... open sockets; ... descriptors in use...
        <BLANKLINE>
        Cannot see: ...
    """
    return "\n\n".join("\n".join(part.lines) for part in sections(report)) + "\n"


def render_with_header(report: Report) -> str:
    """The same below a line that says when and by whom it was made, for a log of many reports."""
    return f"{_date_line(report)}\n{render_text(report)}\n"


def sections_with_header(report: Report) -> Iterator[Section]:
    """Part by part, that line first."""
    yield Section(None, [_date_line(report)])
    yield from sections(report)


def _date_line(report: Report) -> str:
    return truncate(
        f"== {date(report.taken_at)}  process {report.pid} on {report.host}: {report.command}"
    )


def sections(report: Report) -> Iterator[Section]:
    """What a report has to tell, part by part."""
    yield Section(None, _headline(report))
    for alert in report.alerts:
        yield Section(alert.severity, _alert(alert))
    for group in report.by_site():
        yield Section(group.severity, list(site_lines(group)), group)
    if report.closed_late:
        yield Section(None, list(_closed(report.closed_late)))
    yield Section(None, _cannot_see(report.coverage))


def _headline(report: Report) -> list[str]:
    verdicts: Counter[Verdict] = Counter()
    for leak in report.findings:
        verdicts[leak.verdict] += leak.count
    told = [
        f"{verdicts[verdict]} {verdict_name(verdict)}" for verdict in Verdict if verdicts[verdict]
    ]
    if report.omitted:
        told.append(f"{report.omitted:,} left out")
    found = ", ".join(told) or "no leak"
    sockets = f"closewait_guard: {found} of {pluralize(report.open_sockets, 'open socket')}"
    return wrap_text(f"{sockets}; {_descriptors(report)}", "  ")


def _descriptors(report: Report) -> str:
    used, limit = report.fd_used, report.fd_limit
    if used is None:
        return "descriptors in use unknown"
    if not limit:
        return f"{used:,} descriptors in use"
    return f"{used:,} of {limit:,} descriptors in use ({used / limit:.0%})"


def _alert(alert: Alert) -> list[str]:
    if alert.status is AlertStatus.RESOLVED:
        return wrap_text(f"RESOLVED  {alert.kind.upper()}: no longer so: {alert.message}", "  ")
    return wrap_text(f"{alert.severity.upper()}  {alert.kind.upper()}: {alert.message}", "  ")


def _closed(closed: tuple[ClosedLate, ...]) -> Iterator[str]:
    """One sentence for each site."""
    for place, group in groupby(sorted(closed, key=_place), key=_place):
        those = list(group)
        kept = [each.after for each in those]
        what = f"{pluralize(sum(each.finding.count for each in those), 'socket')} opened at {place}"
        yield from wrap_text(
            f"CLOSED LATE, after {format_duration_range(min(kept), max(kept))}: {what}", "  "
        )


def _place(closed: ClosedLate) -> str:
    site = closed.finding.observation.record.site
    return site.place if site is not None else "an unknown place"


def _cannot_see(coverage: Coverage) -> list[str]:
    notes = list(coverage.notes)
    if coverage.adopted:
        notes.append(f"the birth of {pluralize(coverage.adopted, 'socket')} older than the guard")
    if coverage.forgotten:
        notes.append(
            f"the births of {coverage.forgotten:,} of {coverage.dropped:,} dropped sockets, "
            "whose records had to make room"
        )
    if coverage.failures:
        notes.append(f"{coverage.failures:,} births or deaths that failed to be recorded")
    return wrap_text(f"Cannot see: {'; '.join(notes)}.", "  ")
