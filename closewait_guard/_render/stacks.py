"""Open and leaked sockets by the calls that opened them: flame graph, collapsed stacks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from closewait_guard._format import Layout, escape_control, pluralize, shorten
from closewait_guard._render.markup import escape_text, join_parts
from closewait_guard._render.site import verdict_name, why_unknown
from closewait_guard.model import Finding, FrameKind, Report, SocketRecord, Verdict

__all__ = [
    "StackCall",
    "StackCounts",
    "collapsed_lines",
    "count_stacks",
    "flame_graph",
]


# The roots.
_LEAKED, _OPEN = "leaked", "open"
_MAX_BOXES = 4_000
_ROW = 18


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
        return _LEAKED
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
    for calls, count in _in_order(counts):
        yield f"{';'.join(call.text for call in calls)} {count}"


def _in_order(counts: StackCounts) -> list[tuple[tuple[StackCall, ...], int]]:
    """Those with the same callers beside each other."""
    return sorted(counts.items(), key=lambda item: [call.text for call in item[0]])


class _Box(NamedTuple):
    """One rectangle.

    Attributes:
        root: What stands above all of it.
        depth: How many calls stand between that and this, this one included; of a root 0.
        start: How many sockets are to the left of it.
        sockets: How many have this call.
    """

    call: StackCall
    root: str
    depth: int
    start: int
    sockets: int


def flame_graph(counts: StackCounts) -> str:
    """The graph, and a note on what it leaves out."""
    total = sum(counts.values())
    found = sorted(_boxes(counts), key=lambda box: -box.sockets)
    drawn = sorted(found[:_MAX_BOXES], key=lambda box: (box.depth, box.start))
    height = (max((box.depth for box in drawn), default=-1) + 1) * _ROW
    left_out = pluralize(len(found) - len(drawn), "call")
    return join_parts(
        [
            f'<div class="wide flame"><svg width="100%" height="{height}" role="group" '
            'aria-label="Sockets by the calls that opened them">',
            *(_rectangle(box, total) for box in drawn),
            "</svg></div>",
            f'<p class="note">{left_out} with the fewest sockets left out.</p>'
            if len(found) > len(drawn)
            else "",
        ]
    )


def _boxes(counts: StackCounts) -> Iterator[_Box]:
    """The rectangles; calls that are alike and have the same callers are one."""
    unfinished: list[tuple[StackCall, int]] = []
    position = 0
    for calls, count in _in_order(counts):
        common = 0
        for (call, _), other in zip(unfinished, calls, strict=False):
            if call != other:
                break
            common += 1
        yield from _finish(unfinished, common, position)
        unfinished += [(call, position) for call in calls[common:]]
        position += count
    yield from _finish(unfinished, 0, position)


def _finish(unfinished: list[tuple[StackCall, int]], depth: int, end: int) -> Iterator[_Box]:
    """Those from a depth on, which end at a position."""
    while len(unfinished) > depth:
        root = unfinished[0][0].text
        call, start = unfinished.pop()
        yield _Box(call, root, len(unfinished), start, end - start)


def _rectangle(box: _Box, total: int) -> str:
    """An `svg` of its own: it cuts off the text that has no room in it."""
    start, width = 100 * box.start / total, 100 * box.sockets / total
    text = escape_text(box.call.text)
    kind = "root" if box.call.kind is None else box.call.kind.value
    family = "leak" if box.root == _LEAKED else "other"
    label = f"{text}: {pluralize(box.sockets, 'socket')} ({box.sockets / total:.0%})"
    return (
        f'<svg class="box {kind} {family}" role="button" tabindex="-1" aria-label="{label}" '
        f'x="{start:.4f}%" y="{box.depth * _ROW}" width="{width:.4f}%" height="{_ROW - 1}" '
        f'data-call="{text}"><title>{label}</title><rect width="100%" height="100%"/>'
        f'<text x="4" y="{_ROW - 5}">{text}</text></svg>'
    )
