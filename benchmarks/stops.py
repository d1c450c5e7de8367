"""How long another thread stands still while holders are searched for in a large heap."""

from __future__ import annotations

import gc
import json
import socket
import subprocess
import sys
import threading
import time
from importlib import import_module
from typing import Any, Self

import closewait_guard as cwg
from benchmarks.result import Result

_TICK = 0.001
_LONGEST_STOP, _LARGEST_SHARE = 20.0, 0.01
_INTERVALS = (0.1, 1.0)


class _Thing:
    __slots__ = ("held",)

    def __init__(self, held: object) -> None:
        self.held = held


class _Ticker:
    """A thread that wants to run every millisecond; notes by how much it was late.

    Only as far as this process has used the processor meanwhile: what else runs on the machine is
    no fault of its threads.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ended.is_set():
            due, spent = time.perf_counter() + _TICK, time.process_time()
            time.sleep(_TICK)
            late, used = time.perf_counter() - due, time.process_time() - spent
            self.longest = max(self.longest, min(late, used))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def run(*, quick: bool) -> list[Result]:
    size, seconds = (50_000, 3) if quick else (5_000_000, 40)
    results = []
    for interval in _INTERVALS:
        command = [sys.executable, "-m", "benchmarks.stops", f"{size}", f"{seconds}", f"{interval}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        stop, share, named = json.loads(done.stdout)
        name = f"{size:,} objects, a leak a second, monitor at {interval:g} s"
        results += [
            Result(f"{name}: longest stop of a thread", stop * 1e3, "ms", None, _LONGEST_STOP),
            Result(f"{name}: of a core", share * 100, "%", share, _LARGEST_SHARE),
            Result(f"{name}: leaks with holders", named * 100, "%"),
        ]
    return results


def _main(size: int, seconds: int, interval: float) -> None:
    gc.disable()
    # A library with pools, which are asked whether a connection waits in one.
    import_module("urllib3")
    heap = [_Thing([number]) for number in range(size // 2)]
    kept: list[Any] = []
    reports: list[cwg.Report] = []
    guard = cwg.Guard(cwg.Settings(grace=0.0), [reports.append])
    with guard, cwg.Monitor(guard, interval, at_exit=False), _Ticker() as ticker:
        thread = next(each for each in threading.enumerate() if "monitor" in each.name)
        begun = time.perf_counter()
        for number in range(seconds):
            _leak(kept, number)
            time.sleep(1)
        spent = time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
        share = spent / (time.perf_counter() - begun)
    assert heap
    named = sum(bool(leak.holders) for leak in reports[-1].findings)
    print(json.dumps([ticker.longest, share, named / len(kept)]))


def _leak(kept: list[Any], number: int) -> None:
    """Leave a socket whose peer has gone, each time from a line of its own."""
    source = "\n" * number + "ours, theirs = socket.socketpair()"
    made: dict[str, Any] = {"socket": socket}
    exec(compile(source, __file__, "exec"), made)
    made["theirs"].close()
    kept.append(made["ours"])


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
