"""What `import closewait_guard`, `install()` and `watch()` take at the start of a program.

Timed inside processes that have compiled files, and where no pyproject.toml has to be read.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.environment import as_installed
from benchmarks.result import Result

_BEFORE = "import socket, threading"
_IMPORT = "import closewait_guard"
_INSTALL = f"{_IMPORT}; closewait_guard.install()"
_WATCH = f"{_INSTALL}; closewait_guard.watch()"
_PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_TIMED = f"{_BEFORE}, time; t = time.perf_counter(); {{}}; print((time.perf_counter() - t) * 1e3)"
# Not getrusage(), whose peak is that of the parent before exec().
_PEAK = "{}; print(next(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))"


def run(*, quick: bool) -> list[Result]:
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as project:
        shutil.copy(_PYPROJECT, project)
        return [*_times(3 if quick else 15, empty, project), *_peaks(empty)]


def _times(rounds: int, empty: str, project: str) -> list[Result]:
    places = [(_IMPORT, empty), (_INSTALL, empty), (_INSTALL, project), (_WATCH, empty)]
    found = [
        (_interpreter(empty), *(_python(_TIMED.format(code), place) for code, place in places))
        for _ in range(rounds)
    ]
    alone, imported, installed, configured, watching = map(
        statistics.median, zip(*found, strict=True)
    )
    return [
        Result("interpreter alone, from start to end", alone, "ms"),
        Result("import closewait_guard", imported, "ms", bound=15),
        Result("import and install()", installed, "ms"),
        Result("import and install(), in a project with a pyproject.toml", configured, "ms"),
        Result("import, install() and watch()", watching, "ms"),
    ]


def _peaks(place: str) -> list[Result]:
    bare, installed, watching = (
        _python(_PEAK.format(code), place) / 1024
        for code in (_BEFORE, f"{_BEFORE}; {_INSTALL}", f"{_BEFORE}; {_WATCH}")
    )
    return [
        Result("import and install(), memory", installed - bare, "MiB"),
        Result("import, install() and watch(), memory with its thread", watching - bare, "MiB"),
    ]


def _interpreter(place: str) -> float:
    started = time.perf_counter()
    _python("print(0)", place)
    return (time.perf_counter() - started) * 1e3


def _python(code: str, place: str) -> float:
    """The number that `code` prints."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        check=True,
        cwd=place,
        env=as_installed(),
        capture_output=True,
        text=True,
    )
    return float(done.stdout)
