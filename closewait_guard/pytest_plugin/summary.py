"""What the terminal shows at the end of the run: pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from closewait_guard._lines import one_line
from closewait_guard._words import count_of, seconds
from closewait_guard.pytest_plugin.blocks import blocks, cannot_see
from closewait_guard.pytest_plugin.finding import Finding, Outcome
from closewait_guard.pytest_plugin.sites import Site, place, sites

__all__ = ["summary"]

_MOST_OWNERS = 3
_MOST_SETTLES = 3
_SHORT_SETTLE = 0.05

_SAID = {
    Outcome.FAILED: "leaked",
    Outcome.WARNED: "leaked (socket_leaks=warn)",
    Outcome.ALLOWED: "leaked, and allowed to",
}


def summary(findings: Sequence[Finding], root: Path, *, whole_stacks: bool = False) -> list[str]:
    """The lines of the section; none when there is nothing to tell."""
    lines: list[str] = []
    for site in sites(findings):
        lines += [*_site_lines(site, root, whole_stacks=whole_stacks), ""]
    lines += _waivers(findings)
    if lines:
        lines += [*_settles(findings), *_not_seen(findings)]
    return [one_line(line) for line in lines]


def _site_lines(site: Site, root: Path, *, whole_stacks: bool) -> Iterator[str]:
    verdicts = Counter(leak.verdict.replace("_", " ") for leak in site.leaks)
    told = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
    kinds = Counter(finding.kind for finding in site.owners)
    by = " and ".join(count_of(number, kind) for kind, number in kinds.items())
    sockets = f"{count_of(len(site.leaks), 'socket')} ({told})"
    yield f"{place(site.frame, root)}: {sockets} {_SAID[site.outcome]} by {by}"
    for finding in site.owners[:_MOST_OWNERS]:
        notes = ", ".join(note for note in (finding.worker, finding.reason) if note)
        yield f"    {finding.owner}" + (f" ({notes})" if notes else "")
    if len(site.owners) > _MOST_OWNERS:
        yield f"    and {len(site.owners) - _MOST_OWNERS} more"
    first = site.owners[0].report
    if whole_stacks and first is not None:
        report = replace(first, leaks=site.leaks)
        yield from ("  " + line for line in blocks(report, whole_stacks=True))


def _waivers(findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        if finding.outcome is Outcome.UNUSED_WAIVER:
            yield (
                f"{finding.owner} is allowed to leak sockets ({finding.reason}) and does not any "
                "more: remove its allow_socket_leaks marker"
            )


def _settles(findings: Sequence[Finding]) -> Iterator[str]:
    waited = [finding for finding in findings if finding.waited >= _SHORT_SETTLE]
    slowest = sorted(waited, key=lambda finding: -finding.waited)[:_MOST_SETTLES]
    if slowest:
        told = ", ".join(f"{seconds(each.waited)} {each.owner}" for each in slowest)
        yield f"Slowest to settle: {told}"


def _not_seen(findings: Sequence[Finding]) -> Iterator[str]:
    reports = [finding.report for finding in findings if finding.report is not None]
    if reports:
        yield from cannot_see(reports[-1])
