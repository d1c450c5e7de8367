"""HTTP with a connection for each request: server and client in two processes, guard on and off.

The guard is turned on in the client, in the server, in both, and off, in an order that changes
every fraction of a second, so that what else the machine does falls on all alike. Ratios are
medians over rounds, each against the round without the guard beside it.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import closewait_guard as cwg
from benchmarks.http_programs import PROGRAMS
from benchmarks.result import Result

_ROOT = Path(__file__).resolve().parent.parent
_WARM_UP, _REQUESTS = 20, 25

# Whether the guard is on in the client, and in the server.
_VARIANTS = {
    "bare": (False, False),
    "guard in the client": (True, False),
    "guard in the server": (False, True),
    "guard in both": (True, True),
}
# At most 3 % fewer requests: a request takes so many times as long.
_BOUND = 1 / 0.97


class _Round(NamedTuple):
    """How long each request took, and how much CPU time both processes did, in seconds."""

    latencies: list[float]
    cpu: float


_Cycle = dict[str, _Round]


def run(*, quick: bool) -> list[Result]:
    found: list[Result] = []
    for name, cycles in (("http.server, http.client", 120), ("uvicorn, requests", 60)):
        with _server(name) as server:
            measured = _measured(name, server, 2 if quick else cycles)
        for variant in _VARIANTS:
            found += _results(name, variant, measured)
    return found


def _results(name: str, variant: str, cycles: list[_Cycle]) -> list[Result]:
    what = f"{name}, {variant}"
    bound = None if variant == "bare" else _BOUND
    took, longer = _compared(cycles, variant, lambda done: statistics.fmean(done.latencies))
    cpu, more = _compared(cycles, variant, lambda done: done.cpu / _REQUESTS)
    p99, bare = (_p99(cycles, each) for each in (variant, "bare"))
    return [
        Result(f"requests: {what}; time of one", 1 / took, "/s", longer, bound),
        Result(f"CPU of both: {what}", cpu * 1e6, "us", more),
        Result(f"p99: {what}", p99 * 1e3, "ms", p99 / bare),
    ]


def _compared(
    cycles: list[_Cycle], variant: str, measure: Callable[[_Round], float]
) -> tuple[float, float]:
    """The median, and the median of the ratios to the bare round of the same cycle."""
    found = [(measure(each[variant]), measure(each["bare"])) for each in cycles]
    return (
        statistics.median(figure for figure, _ in found),
        statistics.median(figure / bare for figure, bare in found),
    )


def _p99(cycles: list[_Cycle], variant: str) -> float:
    """Of all requests together: what is rare needs many."""
    latencies = [latency for each in cycles for latency in each[variant].latencies]
    return statistics.quantiles(latencies, n=100)[98]


def _measured(name: str, server: _Server, count: int) -> list[_Cycle]:
    fetch = PROGRAMS[name].client(server.port)
    cycles = [_cycle(fetch, server) for _ in range(count + 1)]
    return cycles[1:]  # The first one warms up.


def _cycle(fetch: Callable[[], None], server: _Server) -> _Cycle:
    cycle = {}
    for variant in random.sample(list(_VARIANTS), len(_VARIANTS)):
        in_client, in_server = _VARIANTS[variant]
        server.tell("on" if in_server else "off")
        (cwg.install if in_client else cwg.uninstall)()
        cycle[variant] = _requests(fetch, server)
    cwg.uninstall()
    return cycle


def _requests(fetch: Callable[[], None], server: _Server) -> _Round:
    latencies = []
    for _ in range(_WARM_UP):
        fetch()
    cpu = server.tell("time") + time.process_time()
    for _ in range(_REQUESTS):
        started = time.perf_counter()
        fetch()
        latencies.append(time.perf_counter() - started)
    return _Round(latencies, server.tell("time") + time.process_time() - cpu)


class _Server:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._orders, self._answers = process.stdin, process.stdout
        self.port = int(self._answers.readline())

    def tell(self, order: str) -> float:
        """Answers with the CPU time that it has taken so far."""
        self._orders.write(order + "\n")
        self._orders.flush()
        return float(self._answers.readline())


@contextmanager
def _server(name: str) -> Iterator[_Server]:
    command = [sys.executable, "-m", "benchmarks.http_workload", name]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=_ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield _Server(process)
        finally:
            process.terminate()


def _serve(name: str) -> None:
    print(PROGRAMS[name].server(), flush=True)
    orders: dict[str, Callable[[], object]] = {
        "on": cwg.install,
        "off": cwg.uninstall,
        "time": lambda: None,
    }
    for line in sys.stdin:
        orders[line.strip()]()
        print(time.process_time(), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
