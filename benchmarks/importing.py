"""What `import closewait_guard` adds to a bare interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.result import Result


def run(*, quick: bool) -> list[Result]:
    rounds = 3 if quick else 15
    bare, ours = [], []
    for _ in range(rounds):
        bare.append(_milliseconds("pass"))
        ours.append(_milliseconds("import closewait_guard"))
    added = statistics.median(ours) - statistics.median(bare)
    return [
        Result("interpreter alone", statistics.median(bare), "ms"),
        Result("import closewait_guard, beyond that", added, "ms", bound=15),
    ]


def _milliseconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return (time.perf_counter() - started) * 1e3
