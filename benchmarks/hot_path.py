"""What the guard adds to a socket's life, beside tracemalloc, at a call stack 20 deep.

Many short rounds, in each of which all take their turns in another order, so that what else the
machine does falls on all alike. Ratios are medians, each to the bare turn of the same round.
"""

from __future__ import annotations

import random
import socket
import statistics
import time
import tracemalloc
from collections.abc import Callable

import closewait_guard as cwg
from benchmarks.result import Result

_DEPTH = 20


def run(*, quick: bool) -> list[Result]:
    rounds = 2 if quick else 100
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        works: dict[str, tuple[Callable[[int], None], int]] = {
            "socket() + close()": (_pairs, 1000),
            "connect + accept + close": (lambda times: _connections(server, times), 100),
        }
        return [
            result
            for name, (work, times) in works.items()
            for result in _compared(name, work, times, rounds)
        ]


def _compared(name: str, work: Callable[[int], None], times: int, rounds: int) -> list[Result]:
    bounds = _BOUNDS[name]
    found = [
        {
            variant: _turn(variant, work, times)
            for variant in random.sample(list(_VARIANTS), len(_VARIANTS))
        }
        for _ in range(rounds)
    ]
    return [
        Result(
            f"{name}, {variant}",
            statistics.median(each[variant] for each in found),
            "us",
            statistics.median(each[variant] / each["bare"] for each in found),
            bounds.get(variant),
        )
        for variant in _VARIANTS
    ]


def _turn(variant: str, work: Callable[[int], None], times: int) -> float:
    on, off = _VARIANTS[variant]
    on()
    _deep(_DEPTH, lambda: work(times // 5))
    started = time.perf_counter()
    _deep(_DEPTH, lambda: work(times))
    took = time.perf_counter() - started
    off()
    return took / times * 1e6


def _deep(depth: int, work: Callable[[], None]) -> None:
    if depth > 0:
        _deep(depth - 1, work)
    else:
        work()


def _pairs(times: int) -> None:
    make = socket.socket
    for _ in range(times):
        sock = make()
        sock.close()


def _connections(server: socket.socket, times: int) -> None:
    address = server.getsockname()
    for _ in range(times):
        client = socket.create_connection(address)
        accepted, _ = server.accept()
        client.close()
        accepted.close()


def _nothing() -> None:
    pass


_VARIANTS: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "bare": (_nothing, _nothing),
    "guard, stack depth 0": (lambda: cwg.install(stack_depth=0), cwg.uninstall),
    "guard, stack depth 20": (lambda: cwg.install(stack_depth=20), cwg.uninstall),
    "guard, default depth": (cwg.install, cwg.uninstall),
    "guard, default depth, in Python": (lambda: cwg.install(speedups=False), cwg.uninstall),
    "tracemalloc.start(25)": (lambda: tracemalloc.start(25), tracemalloc.stop),
}

_BOUNDS = {
    "socket() + close()": {
        "guard, stack depth 0": 1.35,
        "guard, stack depth 20": 1.7,
        "guard, default depth": 1.3,
    },
    "connect + accept + close": {
        "guard, stack depth 0": 1.12,
        "guard, stack depth 20": 1.25,
        "guard, default depth": 1.12,
    },
}
