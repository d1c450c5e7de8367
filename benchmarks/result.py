"""One measured figure beside what it is measured against."""

from __future__ import annotations

from typing import NamedTuple


class Result(NamedTuple):
    """A figure, its unit, and its ratio to the baseline of the same run.

    Attributes:
        bound: The most that the ratio, or the figure where there is none, is meant to be.
        size: How many sockets there were, where that is what varies.
    """

    name: str
    figure: float
    unit: str
    ratio: float | None = None
    bound: float | None = None
    size: int | None = None


def table(results: list[Result]) -> str:
    """The results in columns."""
    lines = []
    for result in results:
        ratio = f"{result.ratio:8.3f} x" if result.ratio is not None else " " * 10
        bound = f"  (at most {result.bound:g})" if result.bound is not None else ""
        lines.append(f"{result.name:78}{result.figure:11.3f} {result.unit:5}{ratio}{bound}")
    return "\n".join(lines)
