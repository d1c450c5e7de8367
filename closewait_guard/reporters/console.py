"""The same story in colour, with a table of the peers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from closewait_guard._format import format_duration_range, one_line
from closewait_guard._render import Section, render_with_header, sections_with_header
from closewait_guard._stream import checked_stream, put
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
_MOST_PEERS = 10


def console(stream: TextIO | None = None) -> Reporter:
    """Write each report in colour; plain where that is no terminal, or `NO_COLOR` is set.

    Raises:
        MissingExtraError: rich is not installed.
    """
    # Now, because a report may be told when no descriptor is left to import with.
    from closewait_guard import _rich

    stream = checked_stream("console", stream)

    def console_reporter(report: Report) -> None:
        target = stream if stream is not None else sys.stderr
        if os.environ.get("NO_COLOR") or not _is_terminal(target):
            put(stream, render_with_header(report))
            return
        screen = _rich.Console(file=target, highlight=False, soft_wrap=True)
        with screen.capture() as picture:
            screen.print(_rich.Group(*_pictures(report)))
        put(target, picture.get())

    return console_reporter


def _is_terminal(stream: TextIO | None) -> bool:
    return bool(stream is not None and getattr(stream, "isatty", bool)())


def _pictures(report: Report) -> Iterator[RenderableType]:
    from closewait_guard._rich import Text

    for part in sections_with_header(report):
        yield Text("\n").join(Text(line, style) for line, style in _styled(part))
        if (
            part.group is not None
            and len({_peer(leak.observation) for leak in part.group.findings}) > 1
        ):
            yield _peers(part.group)
        yield Text()


def _styled(part: Section) -> Iterator[tuple[str, str]]:
    first = _COLOURS.get(part.severity, "bold") if part.severity else "bold"
    style = first
    for number, line in enumerate(part.lines):
        fitting = (style for start, style in _STYLES if line.startswith(start))
        # A line that goes on from the one before looks like it.
        is_continued = number > 0 and line.startswith("    ") and style == "green"
        style = style if is_continued else next(fitting, first if number == 0 else "")
        yield line, style


def _peers(group: SiteGroup) -> Table:
    from closewait_guard._rich import Table, Text

    table = Table(
        "peer", "sockets", "closed", "unread", box=None, padding=(0, 2), header_style="dim"
    )
    seen: dict[str, list[Observation]] = {}
    for leak in group.findings:
        seen.setdefault(_peer(leak.observation), []).append(leak.observation)
    for peer, those in sorted(seen.items(), key=lambda item: -len(item[1]))[:_MOST_PEERS]:
        ago = [each.peer_closed_for for each in those if each.peer_closed_for is not None]
        unread = sum(each.unread or 0 for each in those)
        closed = f"{format_duration_range(min(ago), max(ago))} ago" if ago else "?"
        # As text, not as a string, in which rich would look for markup.
        table.add_row(Text(one_line(peer)), f"{len(those):,}", closed, f"{unread:,}")
    if len(seen) > _MOST_PEERS:
        table.add_row(f"and {len(seen) - _MOST_PEERS:,} more", "", "", "")
    return table


def _peer(observation: Observation) -> str:
    return observation.peer or "-"
