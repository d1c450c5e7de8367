"""The reporter `console`: the text of a report in colour, with a table of the peers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from closewait_guard._format import escape_line, format_duration_range
from closewait_guard._render import Section, render_with_header, sections_with_header
from closewait_guard._stream import require_stream, write_text
from closewait_guard.model import Observation, Report, Reporter, Severity, SiteGroup

if TYPE_CHECKING:
    from closewait_guard._rich import RenderableType, Table

__all__ = [
    "console",
]


_COLOURS = {Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.CRITICAL: "bold red"}
# By the beginning of a line; the first that fits.
_STYLES = (
    ("        ", "italic"),
    ("    (", "dim"),
    ("    from ", "dim"),
    ("  opened at ", "bold"),
    ("  listener opened at ", "bold"),
    ("  fix: ", "green"),
    ("Cannot see", "dim"),
)
_MAX_PEERS = 10


def console(stream: TextIO | None = None) -> Reporter:
    """Write each report in colour; plain where that is no terminal, or `NO_COLOR` is set.

    Raises:
        MissingExtraError: rich is not installed.
    """
    # Import now, because a report may come when no descriptor is left to import with.
    from closewait_guard import _rich

    stream = require_stream("console", stream)

    def console_reporter(report: Report) -> None:
        target = stream if stream is not None else sys.stderr
        if os.environ.get("NO_COLOR") or not _is_terminal(target):
            write_text(stream, render_with_header(report))
            return
        screen = _rich.Console(file=target, highlight=False, soft_wrap=True)
        with screen.capture() as captured:
            screen.print(_rich.Group(*_render_sections(report)))
        write_text(target, captured.get())

    return console_reporter


def _is_terminal(stream: TextIO | None) -> bool:
    return bool(stream is not None and getattr(stream, "isatty", bool)())


def _render_sections(report: Report) -> Iterator[RenderableType]:
    from closewait_guard._rich import Text

    for section in sections_with_header(report):
        yield Text("\n").join(Text(line, style) for line, style in _style_lines(section))
        if (
            section.group is not None
            and len({_peer(finding.observation) for finding in section.group.findings}) > 1
        ):
            yield _peer_table(section.group)
        yield Text()


def _style_lines(section: Section) -> Iterator[tuple[str, str]]:
    first = _COLOURS.get(section.severity, "bold") if section.severity else "bold"
    style = first
    for number, line in enumerate(section.lines):
        matching = (style for start, style in _STYLES if line.startswith(start))
        # A wrapped line keeps the style of the line before it.
        is_continued = number > 0 and line.startswith("    ") and style == "green"
        style = style if is_continued else next(matching, first if number == 0 else "")
        yield line, style


def _peer_table(group: SiteGroup) -> Table:
    from closewait_guard._rich import Table, Text

    table = Table(
        "peer", "sockets", "closed", "unread", box=None, padding=(0, 2), header_style="dim"
    )
    by_peer: dict[str, list[Observation]] = {}
    for finding in group.findings:
        by_peer.setdefault(_peer(finding.observation), []).append(finding.observation)
    for peer, observations in sorted(by_peer.items(), key=lambda item: -len(item[1]))[:_MAX_PEERS]:
        ago = [each.peer_closed_for for each in observations if each.peer_closed_for is not None]
        unread = sum(each.unread or 0 for each in observations)
        at_least = any(each.is_lower_bound for each in observations)
        span = format_duration_range(min(ago), max(ago), at_least=at_least) if ago else ""
        closed = f"{span} ago" if ago else "?"
        # As Text, because rich looks for markup in a string.
        table.add_row(Text(escape_line(peer)), f"{len(observations):,}", closed, f"{unread:,}")
    if len(by_peer) > _MAX_PEERS:
        table.add_row(f"and {len(by_peer) - _MAX_PEERS:,} more", "", "", "")
    return table


def _peer(observation: Observation) -> str:
    return observation.peer or "-"
