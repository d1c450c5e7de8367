"""The command line as whole processes, beside what people call today."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.environment import as_installed
from benchmarks.result import Result
from benchmarks.scanning import connected

_COMMAND = [str(Path(sys.executable).with_name("closewait-guard"))]


def run(*, quick: bool) -> list[Result]:
    pid, sockets = str(os.getpid()), 300 if quick else 10_000
    found = []
    if shutil.which("lsof"):
        lsof, scan = ["lsof", "-nP", "-p", pid], [*_COMMAND, "scan", pid]
        for closed in (min(100, sockets), sockets):
            with connected(sockets, closed):
                size = f"{sockets:,} sockets, {closed:,} in CLOSE_WAIT"
                names = (f"lsof -nP -p PID, {size}", f"scan PID, {size}")
                found += _compared(names, (lsof, scan), 3 if quick else 11, 1.0)
    bare = [sys.executable, "-c", "import argparse"]
    names = ('python -c "import argparse"', "closewait-guard --help")
    found += _compared(names, (bare, [*_COMMAND, "--help"]), 3 if quick else 25, 1.5)
    return found


def _compared(
    names: tuple[str, str], commands: tuple[list[str], list[str]], rounds: int, bound: float
) -> list[Result]:
    """Theirs and ours in turn, so that both meet the same moments of the machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for taken, command in zip(times, commands, strict=True):
            started = time.perf_counter()
            # The exit code says that leaks were found.
            subprocess.run(command, capture_output=True, check=False, env=as_installed())
            taken.append((time.perf_counter() - started) * 1e3)
    theirs, ours = (statistics.median(taken) for taken in times)
    return [
        Result(names[0], theirs, "ms"),
        Result(names[1], ours, "ms", ours / theirs, bound),
    ]
