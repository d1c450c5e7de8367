"""The reporter `console`: the text of a report in color, with a table of the peers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from closewait_guard._format import Layout, Section, Style, escape_line, format_duration_range
from closewait_guard._render import no_news_line, render_report, sections
from closewait_guard._stream import layout_of, require_stream, write_text
from closewait_guard.model import Observation, Report, Reporter, SiteGroup
from closewait_guard.reporters.filters import Quiet

if TYPE_CHECKING:
    from closewait_guard._rich import RenderableType, Table

__all__ = [
    "console",
    "render_for",
]


_COLOURS = {
    Style.TITLE: "bold",
    Style.PLACE: "bold",
    Style.CODE: "italic",
    Style.FIX: "green",
    Style.NOTE: "dim",
    Style.INFO: "cyan",
    Style.WARNING: "yellow",
    Style.CRITICAL: "bold red",
}
_MAX_PEERS = 10


def console(stream: TextIO | None = None, *, everything: bool = False) -> Reporter:
    """Write each report in color; plain where that is no terminal, or `NO_COLOR` is set.

    Of the reports of a monitor it writes only what has changed, as `text` does.

    Args:
        stream: Where to write; stderr by default.
        everything: Show a block for what is not a leak, too.

    Raises:
        MissingExtraError: rich is not installed.
    """
    # Import now, because a report may come when no descriptor is left to import with.
    from closewait_guard import _rich  # noqa: F401

    stream = require_stream("console", stream)

    def write(report: Report) -> None:
        target = stream if stream is not None else sys.stderr
        write_text(stream, render_for(report, target, everything=everything))

    def write_no_news(report: Report) -> None:
        write_text(stream, no_news_line(report, layout_of(stream)))

    return Quiet("console", write, write_no_news)


def render_for(report: Report, stream: TextIO | None, *, everything: bool = False) -> str:
    """Render a report in color; plain where the stream is no terminal, or `NO_COLOR` is set.

    Raises:
        MissingExtraError: It is a terminal, and rich is not installed.
    """
    layout = layout_of(stream, everything=everything)
    if os.environ.get("NO_COLOR") or not _is_terminal(stream):
        return f"{render_report(report, layout)}\n"
    from closewait_guard import _rich

    screen = _rich.Console(file=stream, highlight=False, soft_wrap=True)
    with screen.capture() as captured:
        screen.print(_rich.Group(*_render_sections(report, layout)))
    return captured.get()


def _is_terminal(stream: TextIO | None) -> bool:
    return bool(stream is not None and getattr(stream, "isatty", bool)())


def _render_sections(report: Report, layout: Layout) -> Iterator[RenderableType]:
    from closewait_guard._rich import Text

    for section in sections(report, layout):
        yield _coloured(section)
        if (
            section.group is not None
            and len({_peer(finding.observation) for finding in section.group.findings}) > 1
        ):
            yield _peer_table(section.group)
        yield Text()


def _coloured(section: Section) -> RenderableType:
    from closewait_guard._rich import Text

    lines = (Text(line.text, _COLOURS.get(line.style, "")) for line in section.lines)
    return Text("\n").join(lines)


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
