"""The reporter `text`: plain text to a stream."""

from __future__ import annotations

from typing import TextIO

from closewait_guard._format import Layout
from closewait_guard._render import no_news_line, render_report
from closewait_guard._stream import layout_of, require_stream, write_text
from closewait_guard.model import Report, Reporter
from closewait_guard.reporters.filters import Quiet

__all__ = [
    "text",
]


def text(stream: TextIO | None = None, *, everything: bool = False) -> Reporter:
    """Write each report as plain text; to stderr by default.

    Of the reports of a monitor it writes only what has changed, and now and then one line that
    nothing has (`Settings.heartbeat`).

    Args:
        stream: Where to write; as wide as it is, if it is a terminal.
        everything: Show a block for what is not a leak, too: stale pools, closing and half-closed
            connections.

    Example:
        >>> import sys
        >>> from closewait_guard import Guard
        >>> with Guard(reporters=[text(sys.stdout)]) as guard:
        ...     _ = guard.report()  # doctest: +ELLIPSIS
        closewait-guard: no leaks (...)  pid ...
    """
    stream = require_stream("text", stream)

    def layout() -> Layout:
        return layout_of(stream, everything=everything)

    def write(report: Report) -> None:
        write_text(stream, with_gap(render_report(report, layout())))

    def write_no_news(report: Report) -> None:
        write_text(stream, no_news_line(report, layout()))

    return Quiet("text", write, write_no_news)


def with_gap(text: str) -> str:
    """A report with an empty line after it, for a log of many; one of a single line without."""
    return f"{text}\n" if text.count("\n") > 1 else text
