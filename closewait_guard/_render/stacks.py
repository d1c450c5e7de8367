"""Open and leaked sockets by the calls that opened them; collapsed stacks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from closewait_guard._format import Layout, escape_control, shorten
from closewait_guard._render.site import verdict_name, why_unknown
from closewait_guard.model import Finding, FrameKind, Report, SocketRecord, Verdict

__all__ = [
    "LEAKED",
    "StackCall",
    "StackCounts",
    "collapsed_lines",
    "count_stacks",
    "in_order",
]


# The roots.
LEAKED, _OPEN = "leaked", "open"


class StackCall(NamedTuple):
    """A call of a stack, or what all calls above it have in common.

    Attributes:
        text: `load (/srv/shop/orders.py:42)`, with nothing in it that ends a line or a call.
        kind: Whose code it is; None for what is no call.
    """

    text: str
    kind: FrameKind | None = None


StackCounts = Mapping[tuple[StackCall, ...], int]


def count_stacks(
    report: Report, layout: Layout, program: str = ""
) -> Counter[tuple[StackCall, ...]]:
    """How many sockets have each stack; the outermost call first, below a root and a program.

    Args:
        report: The healthy sockets are in that of a full scan only.
        layout: The directory that paths are relative to.
        program: What to call the program, where there are several.
    """
    counts: Counter[tuple[StackCall, ...]] = Counter()
    above = (StackCall(_escape(program)),) if program else ()
    for finding in report.findings:
        calls = _calls_of(finding.observation.record, layout)
        counts[(StackCall(_root_of(finding)), *above, *calls)] += finding.count
    for seen in report.observations:
        counts[(StackCall(_OPEN), *above, *_calls_of(seen.record, layout))] += 1
    return counts


def _root_of(finding: Finding) -> str:
    if finding.is_leak:
        return LEAKED
    # Its descriptor is closed, so that it is not open.
    return verdict_name(finding.verdict) if finding.verdict is Verdict.CLOSED_ELSEWHERE else _OPEN


def _calls_of(record: SocketRecord, layout: Layout) -> Sequence[StackCall]:
    stack = record.blamed.stack
    if not stack:
        return (StackCall(_escape(f"({why_unknown(record) or 'no stack'})")),)
    return [
        StackCall(_escape(f"{frame.function} ({layout.relative(frame.place)})"), frame.kind)
        for frame in reversed(stack)
    ]


def _escape(text: str) -> str:
    """Between two calls stands a semicolon, and a stack is a line."""
    return escape_control(shorten(text)).replace(";", ":")


def collapsed_lines(counts: StackCounts) -> Iterator[str]:
    """`leaked;main (app.py:9);load (app.py:4) 12`, for flamegraph.pl and speedscope."""
    for calls, count in in_order(counts):
        yield f"{';'.join(call.text for call in calls)} {count}"


def in_order(counts: StackCounts) -> list[tuple[tuple[StackCall, ...], int]]:
    """Those with the same callers beside each other."""
    return sorted(counts.items(), key=lambda item: [call.text for call in item[0]])
