"""What the guard adds to an owner of sockets, from its making to its close.

Many short rounds, in each of which all take their turns in another order, as for sockets. The time
is what a turn takes more than the bare one of the same round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import closewait_guard as cwg
from benchmarks.result import Result

_DEPTH = 20
_TIMES = 1000
_VARIANTS = ("bare", "tracked")
_MOST_ADDED = 3.0


class _Session:
    """As plain as an owner can be."""

    def close(self) -> None:
        """Have nothing to close."""


def run(*, quick: bool) -> list[Result]:
    rounds = 2 if quick else 100
    found = [
        {each: _turn(each) for each in random.sample(_VARIANTS, len(_VARIANTS))}
        for _ in range(rounds)
    ]
    bare = statistics.median(each["bare"] for each in found)
    added = statistics.median(each["tracked"] - each["bare"] for each in found)
    return [
        Result("an owner, made and closed, bare", bare, "us"),
        Result("an owner, made and closed, what tracking adds", added, "us", None, _MOST_ADDED),
    ]


def _turn(variant: str) -> float:
    with cwg.Guard() as guard:
        if variant == "tracked":
            guard.track(_Session)
        return _deep(_DEPTH, _measure)


def _measure() -> float:
    _make_and_close(_TIMES // 5)
    started = time.perf_counter()
    _make_and_close(_TIMES)
    return (time.perf_counter() - started) / _TIMES * 1e6


def _make_and_close(times: int) -> None:
    for _ in range(times):
        _Session().close()


def _deep(depth: int, work: Callable[[], float]) -> float:
    return work() if depth == 0 else _deep(depth - 1, work)
