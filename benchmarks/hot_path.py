"""What the guard adds to a socket's life, beside tracemalloc, at a call stack 20 deep."""

from __future__ import annotations

import socket
import time
import tracemalloc
from collections.abc import Callable

import closewait_guard as cwg
from benchmarks.result import Result

_DEPTH = 20


def run(*, quick: bool) -> list[Result]:
    rounds, pairs, connections = (2, 500, 50) if quick else (15, 6000, 600)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        works = {
            "socket() + close()": (lambda: _pairs(pairs), pairs),
            "connect + accept + close": (lambda: _connections(server, connections), connections),
        }
        return [
            result
            for name, (work, times) in works.items()
            for result in _compared(name, work, times, rounds)
        ]


def _compared(name: str, work: Callable[[], None], times: int, rounds: int) -> list[Result]:
    bounds = _BOUNDS[name]
    best = {variant: float("inf") for variant in _VARIANTS}
    for _ in range(rounds):
        for variant, (on, off) in _VARIANTS.items():
            on()
            started = time.perf_counter()
            _deep(_DEPTH, work)
            took = time.perf_counter() - started
            off()
            best[variant] = min(best[variant], took / times * 1e6)
    bare = best["bare"]
    return [
        Result(f"{name}, {variant}", took, "us", took / bare, bounds.get(variant))
        for variant, took in best.items()
    ]


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
    "tracemalloc.start(25)": (lambda: tracemalloc.start(25), tracemalloc.stop),
}

_BOUNDS = {
    "socket() + close()": {"guard, stack depth 0": 1.35, "guard, stack depth 20": 1.7},
    "connect + accept + close": {"guard, stack depth 0": 1.12, "guard, stack depth 20": 1.25},
}
