"""The leaks of a report as text, a block for each site."""

from __future__ import annotations

from collections.abc import Iterator

from closewait_guard._block import call
from closewait_guard._render import Part, parts
from closewait_guard.model import Report

__all__ = ["blocks", "cannot_see"]


def blocks(report: Report, *, whole_stacks: bool = False) -> list[str]:
    """The lines; with whole stacks, each call of a birth is told."""
    sites = [part for part in parts(report) if part.group is not None]
    return [line for site in sites for line in ("", *_lines(site, whole_stacks=whole_stacks))][1:]


def _lines(site: Part, *, whole_stacks: bool) -> Iterator[str]:
    yield from site.lines
    if whole_stacks and site.group is not None:
        yield "  the whole stack, innermost call first:"
        for frame in site.group.leaks[0].observation.record.birth.stack:
            yield from call("    ", frame)


def cannot_see(report: Report) -> list[str]:
    """The last paragraph of a report."""
    return list(parts(report))[-1].lines
