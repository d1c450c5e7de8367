"""The flame graph of a page: sockets by the calls that opened them, the outermost on top. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from closewait_guard._format import pluralize
from closewait_guard._render.markup import escape_text, join_parts
from closewait_guard._render.stacks import LEAKED, StackCall, StackCounts, in_order

__all__ = [
    "flame_graph",
]


_MAX_BOXES = 4_000
_ROW = 18


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
    for calls, count in in_order(counts):
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
    family = "leak" if box.root == LEAKED else "other"
    label = f"{text}: {pluralize(box.sockets, 'socket')} ({box.sockets / total:.0%})"
    return (
        f'<svg class="box {kind} {family}" role="button" tabindex="-1" aria-label="{label}" '
        f'x="{start:.4f}%" y="{box.depth * _ROW}" width="{width:.4f}%" height="{_ROW - 1}" '
        f'data-call="{text}"><title>{label}</title><rect width="100%" height="100%"/>'
        f'<text x="4" y="{_ROW - 5}">{text}</text></svg>'
    )
