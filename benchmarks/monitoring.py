"""What a monitor at an interval of one second costs a process with many healthy sockets."""

from __future__ import annotations

import time

import closewait_guard as cwg
from benchmarks.result import Result
from benchmarks.scanning import connected

_INTERVAL = 1.0


def run(*, quick: bool) -> list[Result]:
    size, rounds = (100, 2) if quick else (10_000, 10)
    reported: list[cwg.Report] = []
    with connected(size, closed=0):
        idle = _core_share(rounds)
        with cwg.watch(_INTERVAL, reporters=[reported.append], at_exit=False):
            busy = _core_share(rounds)
    # Fewer than one a second where a look takes more than a hundredth of it.
    assert reported
    assert not any(report.leaks for report in reported)
    name = f"monitor at {_INTERVAL:.0f} s ({len(reported)} reports in {rounds} s), {size:,} sockets"
    return [Result(f"{name}, of a core", (busy - idle) * 100, "%", busy - idle, 0.01)]


def _core_share(rounds: int) -> float:
    """How much of one core this process takes, with the main thread asleep."""
    begun, spent = time.perf_counter(), time.process_time()
    time.sleep((rounds + 0.5) * _INTERVAL)
    return (time.process_time() - spent) / (time.perf_counter() - begun)
