"""The reporter `text`: plain text to a stream."""

from __future__ import annotations

from typing import TextIO

from closewait_guard._render import render_with_header
from closewait_guard._stream import require_stream, write_text
from closewait_guard.model import Report, Reporter

__all__ = [
    "text",
]


def text(stream: TextIO | None = None) -> Reporter:
    """Write each report as plain text, with time and process; to stderr by default.

    Example:
        >>> import sys
        >>> from closewait_guard import Guard
        >>> with Guard(reporters=[text(sys.stdout)]) as guard:
        ...     _ = guard.report()  # doctest: +ELLIPSIS
        == ...
        closewait_guard: ...
    """
    stream = require_stream("text", stream)

    def text_reporter(report: Report) -> None:
        write_text(stream, render_with_header(report))

    return text_reporter
