"""A report as text and as plain data."""

from __future__ import annotations

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

__all__ = [
    "SHARE_WORTH_A_SENTENCE",
    "LastReport",
    "alert_lines",
    "codes_lines",
    "connection_summary",
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
    "render_report",
    "sections",
    "socket_kind",
    "sum_reports",
    "to_dict",
    "verdict_name",
    "with_examples",
    "with_fewer_examples",
]
