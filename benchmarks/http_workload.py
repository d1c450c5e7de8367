"""HTTP with a connection for each request: servers and clients in processes of their own.

Each process is under the guard for all its life, or never, as a user's is: who turns it on and off
pays for what the interpreter has to learn again. Where the memory of a process happens to lie makes
some per cent: there are two of each, and they are replaced by new ones several times. Pairs take
turns in a random order every fraction of a second, so that what else the machine does falls on all
alike. Ratios are medians over rounds, each against the round of a bare pair beside it.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import closewait_guard as cwg
from benchmarks.http_programs import PROGRAMS
from benchmarks.result import Result

_ROOT = Path(__file__).resolve().parent.parent
_OF_EACH, _GENERATIONS = 2, 6
_FIRST_WARM_UP, _WARM_UP, _REQUESTS = 50, 5, 40

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
    for name, cycles in (("http.server, http.client", 14), ("uvicorn, requests", 12)):
        measured: list[_Cycle] = []
        for _ in range(1 if quick else _GENERATIONS):
            with _processes(name) as (clients, servers):
                measured += _measured(clients, servers, 2 if quick else cycles)
        for variant in _VARIANTS:
            found += _results(name, variant, measured)
    return found


def _results(name: str, variant: str, cycles: list[_Cycle]) -> list[Result]:
    what = f"{name}, {variant}"
    bound = None if variant == "bare" else _BOUND
    took, longer = _compared(cycles, variant, lambda done: statistics.fmean(done.latencies))
    quick, slower = _compared(cycles, variant, _faster_half)
    cpu, more = _compared(cycles, variant, lambda done: done.cpu / _REQUESTS)
    p99, bare = (_p99(cycles, each) for each in (variant, "bare"))
    return [
        Result(f"requests: {what}; time of one", 1 / took, "/s", longer, bound),
        Result(f"faster half: {what}", quick * 1e3, "ms", slower, bound),
        Result(f"CPU of both: {what}", cpu * 1e6, "us", more),
        Result(f"p99: {what}", p99 * 1e3, "ms", p99 / bare),
    ]


def _faster_half(done: _Round) -> float:
    """What a request takes when nothing disturbs it: that falls into the slower half."""
    return statistics.fmean(sorted(done.latencies)[: len(done.latencies) // 2])


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


class _Process:
    """A server that says its port first, or a client; each answers an order with figures."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._orders, self._answers = process.stdin, process.stdout
        self.port = int(self._answers.readline())

    def ask(self, *order: int) -> list[float]:
        """Of a server the CPU time so far; of a client that of its requests, and the latencies."""
        self._orders.write(json.dumps(order) + "\n")
        self._orders.flush()
        answer: list[float] = json.loads(self._answers.readline())
        return answer


# By whether they are under the guard.
_Processes = dict[bool, list[_Process]]


@contextmanager
def _processes(name: str) -> Iterator[tuple[_Processes, _Processes]]:
    """Clients and servers. All are started before the first is waited for."""
    with ExitStack() as stack:
        started = {
            (role, guarded): [
                stack.enter_context(_started(role, name, guarded)) for _ in range(_OF_EACH)
            ]
            for role, guarded in product(("fetch", "serve"), (False, True))
        }
        ready = {kind: [_Process(each) for each in alike] for kind, alike in started.items()}
        clients, servers = (
            {guarded: ready[role, guarded] for guarded in (False, True)}
            for role in ("fetch", "serve")
        )
        yield clients, servers


@contextmanager
def _started(role: str, name: str, guarded: bool) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.http_workload", role, name]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, "guard"] if guarded else command, cwd=_ROOT, stdin=pipe, stdout=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def _measured(clients: _Processes, servers: _Processes, count: int) -> list[_Cycle]:
    for client, server in product(*(chain(*each.values()) for each in (clients, servers))):
        client.ask(server.port, _FIRST_WARM_UP)
    return [_cycle(clients, servers) for _ in range(count)]


def _cycle(clients: _Processes, servers: _Processes) -> _Cycle:
    cycle, which = {}, (random.randrange(_OF_EACH), random.randrange(_OF_EACH))
    for variant in random.sample(list(_VARIANTS), len(_VARIANTS)):
        in_client, in_server = _VARIANTS[variant]
        cycle[variant] = _round(clients[in_client][which[0]], servers[in_server][which[1]])
    return cycle


def _round(client: _Process, server: _Process) -> _Round:
    client.ask(server.port, _WARM_UP)
    (before,) = server.ask()
    cpu, *latencies = client.ask(server.port, _REQUESTS)
    (after,) = server.ask()
    return _Round(latencies, cpu + after - before)


def _serve(name: str) -> None:
    print(PROGRAMS[name].server(), flush=True)
    for _ in sys.stdin:
        print(json.dumps([time.process_time()]), flush=True)


def _fetch(name: str) -> None:
    print(0, flush=True)
    for line in sys.stdin:
        port, count = json.loads(line)
        print(json.dumps(_fetched(PROGRAMS[name].client(port), count)), flush=True)


def _fetched(fetch: Callable[[], None], count: int) -> list[float]:
    latencies, cpu = [], time.process_time()
    for _ in range(count):
        started = time.perf_counter()
        fetch()
        latencies.append(time.perf_counter() - started)
    return [time.process_time() - cpu, *latencies]


def _main(role: str, name: str, *guard: str) -> None:
    if guard:
        cwg.install()
    {"serve": _serve, "fetch": _fetch}[role](name)


if __name__ == "__main__":
    _main(*sys.argv[1:])
