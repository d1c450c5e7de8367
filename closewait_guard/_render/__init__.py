"""A report as text and as plain data."""

from __future__ import annotations

from closewait_guard._render.dicts import from_dict, to_dict
from closewait_guard._render.family import LastReport, render_family
from closewait_guard._render.site import (
    connection_summary,
    frame_lines,
    site_lines,
    socket_kind,
    verdict_name,
)
from closewait_guard._render.text import (
    Section,
    native_note,
    render_text,
    render_with_header,
    sections,
    sections_with_header,
)

__all__ = [
    "LastReport",
    "Section",
    "connection_summary",
    "frame_lines",
    "from_dict",
    "native_note",
    "render_family",
    "render_text",
    "render_with_header",
    "sections",
    "sections_with_header",
    "site_lines",
    "socket_kind",
    "to_dict",
    "verdict_name",
]
