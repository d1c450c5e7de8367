"""Text as HTML. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from closewait_guard._format import StyledLine, escape_control, shorten

__all__ = [
    "escape_text",
    "join_parts",
    "line_text",
    "link_to",
    "with_code",
]


def escape_text(text: str) -> str:
    r"""Text as it stands in an element, or between quotation marks.

    Example:
        >>> escape_text("</script>\u2028\u202e\udc80")
        '&lt;/script&gt;\\u2028\\u202e\\udc80'
    """
    return escape(escape_control(shorten(text)))


def join_parts(parts: Iterable[str]) -> str:
    return "\n".join(filter(None, parts))


def link_to(address: str, text: str) -> str:
    """A link that leaves the page open, and what was filtered in it."""
    name = escape_text(text)
    return f'<a href="{escape_text(address)}" target="_blank" rel="noreferrer">{name}</a>'


def line_text(line: StyledLine) -> str:
    return escape_text(line.text.strip())


def with_code(text: str) -> str:
    """A sentence with code in backticks."""
    parts = escape_text(text).split("`")
    if not len(parts) % 2:
        return escape_text(text)
    return "".join(
        f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts)
    )
