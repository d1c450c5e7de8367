"""What the guard adds to an owner of sockets, from its making to its close, and to a check-out.

Many short rounds, in each of which all take their turns in another order, as for sockets. The time
is what a turn takes more than the bare one of the same round.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import sqlalchemy
import urllib3

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
        *_checkouts(rounds),
    ]


@contextlib.contextmanager
def _sqlalchemy() -> Iterator[Callable[[], object]]:
    with tempfile.TemporaryDirectory() as folder:
        engine = sqlalchemy.create_engine(f"sqlite:///{folder}/pool.db")
        try:
            yield lambda: engine.raw_connection().close()
        finally:
            engine.dispose()


@contextlib.contextmanager
def _urllib3() -> Iterator[Callable[[], object]]:
    with urllib3.HTTPConnectionPool("127.0.0.1") as pool:
        yield lambda: pool._put_conn(pool._get_conn())


# What one of them takes from its pool and gives back, and the most that recording may add. Of the
# first, SQLAlchemy itself takes a part to call its listeners.
_POOLS = (
    ("a connection of SQLAlchemy, taken and given back", _sqlalchemy, 8.0),
    ("a connection of urllib3, taken and given back", _urllib3, 5.0),
)


def _checkouts(rounds: int) -> Iterator[Result]:
    for what, open_pool, most in _POOLS:
        found = [
            {each: _turn_of_pool(each, open_pool) for each in random.sample(_VARIANTS, 2)}
            for _ in range(rounds)
        ]
        bare = statistics.median(each["bare"] for each in found)
        added = statistics.median(each["tracked"] - each["bare"] for each in found)
        yield Result(f"{what}, bare", bare, "us")
        yield Result(f"{what}, what recording adds", added, "us", None, most)


def _turn_of_pool(
    variant: str, open_pool: Callable[[], contextlib.AbstractContextManager[Callable[[], object]]]
) -> float:
    with contextlib.ExitStack() as stack:
        take_and_give_back = stack.enter_context(open_pool())
        if variant == "tracked":
            stack.enter_context(cwg.Guard())
        return _deep(_DEPTH, lambda: _time(take_and_give_back))


def _turn(variant: str) -> float:
    with cwg.Guard() as guard:
        if variant == "tracked":
            guard.track(_Session)
        return _deep(_DEPTH, lambda: _time(lambda: _Session().close()))


def _time(work: Callable[[], object]) -> float:
    """Microseconds of one of many calls."""
    for _ in range(_TIMES // 5):
        work()
    started = time.perf_counter()
    for _ in range(_TIMES):
        work()
    return (time.perf_counter() - started) / _TIMES * 1e6


def _deep(depth: int, work: Callable[[], float]) -> float:
    return work() if depth == 0 else _deep(depth - 1, work)
