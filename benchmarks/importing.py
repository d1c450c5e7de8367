"""What `import closewait_guard` adds to a bare interpreter, and `install()` to one with sockets."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.environment import as_installed
from benchmarks.result import Result

_BARE, _IMPORTED = "pass", "import closewait_guard"
_SOCKETS, _INSTALLED = "import socket", "import socket, closewait_guard; closewait_guard.install()"
# Not getrusage(), whose peak is that of the parent before exec().
_PEAK = "; print(next(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))"


def run(*, quick: bool) -> list[Result]:
    rounds = 3 if quick else 15
    times: dict[str, list[float]] = {code: [] for code in (_BARE, _IMPORTED, _SOCKETS, _INSTALLED)}
    for _ in range(rounds):
        for code, taken in times.items():
            taken.append(_milliseconds(code))
    bare, imported, sockets, installed = map(statistics.median, times.values())
    memory = _peak(_INSTALLED) - _peak(_SOCKETS)
    return [
        Result("interpreter alone", bare, "ms"),
        Result("import closewait_guard, beyond that", imported - bare, "ms", bound=15),
        Result("install(), beyond import socket", installed - sockets, "ms"),
        Result("install(), memory beyond import socket", memory, "MiB"),
    ]


def _milliseconds(code: str) -> float:
    started = time.perf_counter()
    _python(code)
    return (time.perf_counter() - started) * 1e3


def _peak(code: str) -> float:
    return int(_python(code + _PEAK)) / 1024


def _python(code: str) -> str:
    command, environment = [sys.executable, "-c", code], as_installed()
    return subprocess.run(
        command, check=True, env=environment, stdout=subprocess.PIPE, text=True
    ).stdout
