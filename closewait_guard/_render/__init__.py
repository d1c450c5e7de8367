"""A report as text, as plain data, and as a page; what makes pages is loaded with the first."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from closewait_guard._render.connection import connection_summary
from closewait_guard._render.descriptors import (
    SHARE_WORTH_A_SENTENCE,
    descriptor_kinds,
    fd_numbers,
    has_descriptor_alert,
    list_kinds,
)
from closewait_guard._render.dicts import (
    from_dict,
    to_dict,
    with_examples,
    with_fewer_examples,
)
from closewait_guard._render.family import (
    LastReport,
    difference,
    group_by_peer,
    has_more,
    peer_phrase,
    render_family,
    sum_reports,
)
from closewait_guard._render.site import (
    describe_site,
    holder_facts,
    socket_kind,
    verdict_name,
)
from closewait_guard._render.text import (
    alert_lines,
    codes_lines,
    is_quiet,
    native_note,
    no_news_line,
    not_covered_lines,
    program_name,
    render_report,
    sections,
)

if TYPE_CHECKING:
    from closewait_guard._render.page import Part, count_stacks_of, render_page
    from closewait_guard._render.stacks import collapsed_lines
else:
    _HOMES = {
        "Part": "page",
        "collapsed_lines": "stacks",
        "count_stacks_of": "page",
        "render_page": "page",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = [
    "SHARE_WORTH_A_SENTENCE",
    "LastReport",
    "Part",
    "alert_lines",
    "codes_lines",
    "collapsed_lines",
    "connection_summary",
    "count_stacks_of",
    "describe_site",
    "descriptor_kinds",
    "difference",
    "fd_numbers",
    "from_dict",
    "group_by_peer",
    "has_descriptor_alert",
    "has_more",
    "holder_facts",
    "is_quiet",
    "list_kinds",
    "native_note",
    "no_news_line",
    "not_covered_lines",
    "peer_phrase",
    "program_name",
    "render_family",
    "render_page",
    "render_report",
    "sections",
    "socket_kind",
    "sum_reports",
    "to_dict",
    "verdict_name",
    "with_examples",
    "with_fewer_examples",
]
