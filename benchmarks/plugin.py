"""What the pytest plugin adds to a suite: whole processes, with and without it in turns."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import entry_points
from operator import truediv
from pathlib import Path

from benchmarks.environment import as_installed
from benchmarks.result import Result

_TESTS_A_FILE = 100
_TRIVIAL = "def test_{0}():\n    assert {0} == {0}\n\n\n"
_BUSY = "def test_{0}():\n    for _ in range(10):\n        socket.socket().close()\n\n\n"
_WITHOUT = ("-p", "no:closewait_guard")
_OFF: tuple[str, ...] = ()
_FAIL = ("--socket-leaks=fail",)
# What else shows the line that made an unclosed socket: ResourceWarning with this. It is slow.
_TRACING = ("-X", "tracemalloc=25")
_TESTS_WHEN_TRACING = 200


def run(*, quick: bool) -> list[Result]:
    tests, rounds = (200, 1) if quick else (2000, 41)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        trivial = _suite(Path(folder) / "trivial", "", _TRIVIAL, tests)
        busy = _suite(Path(folder) / "busy", "import socket\n\n\n", _BUSY, tests)
        results += _compared(f"{tests:,} tests without sockets", trivial, rounds, 1.03)
        results += _compared(f"{tests:,} tests, ten sockets each", busy, rounds, 1.10)
        results.append(_traced(Path(folder)))
        results.append(_version(rounds, Path(folder)))
    return results


def _traced(folder: Path) -> Result:
    suite = _suite(folder / "traced", "import socket\n\n\n", _BUSY, _TESTS_WHEN_TRACING)
    bare, traced = _seconds(suite, _WITHOUT), _seconds(suite, _WITHOUT, *_TRACING)
    name = f"{_TESTS_WHEN_TRACING} tests, ten sockets each, without it, -X tracemalloc=25"
    return Result(name, traced, "s", traced / bare)


def _suite(folder: Path, head: str, test: str, tests: int) -> Path:
    folder.mkdir()
    for number in range(tests // _TESTS_A_FILE):
        body = "".join(test.format(each) for each in range(_TESTS_A_FILE))
        (folder / f"test_{number}.py").write_text(head + body, encoding="utf-8")
    return folder


def _compared(name: str, folder: Path, rounds: int, bound: float) -> list[Result]:
    times: dict[tuple[str, ...], list[float]] = {_WITHOUT: [], _OFF: [], _FAIL: []}
    for options in times:
        _seconds(folder, options)
    for number in range(rounds):
        # None is always the first, whom a machine that has just slept serves best.
        order = list(times)[number % 3 :] + list(times)[: number % 3]
        for options in order:
            times[options].append(_seconds(folder, options))
    # Each beside the bare run of its own round: what else the machine does comes and goes.
    bare = times[_WITHOUT]
    return [
        Result(f"{name}, without the plugin", statistics.median(bare), "s", 1.0),
        *(
            Result(f"{name}, {label}", statistics.median(times[options]), "s", ratio, bound)
            for label, options in (("off", _OFF), ("fail", _FAIL))
            for ratio in (statistics.median(map(truediv, times[options], bare)),)
        ),
    ]


def _version(rounds: int, folder: Path) -> Result:
    pairs = [
        [_seconds(folder, (*options, "--version")) for options in (_WITHOUT, _OFF)]
        for _ in range(max(3, rounds))
    ]
    added = statistics.median(ours - bare for bare, ours in pairs)
    return Result("pytest --version, what the plugin adds", added * 1e3, "ms", bound=5)


def _seconds(folder: Path, options: tuple[str, ...], *interpreter: str) -> float:
    """One run of pytest, with the plugins that it comes with and ours."""
    command = [
        sys.executable,
        *interpreter,
        "-m",
        "pytest",
        "-q",
        *_OTHERS,
        *options,
        str(folder),
    ]
    started = time.perf_counter()
    # Compiled files: pytest too keeps what it has compiled.
    subprocess.run(command, check=True, cwd=folder, env=as_installed(), stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _other_plugins() -> list[str]:
    """Options that leave them out. pytest looks for plugins with and without ours, as it does."""
    found = {each.name for each in entry_points(group="pytest11")} - {"closewait_guard"}
    return [f"-pno:{name}" for name in sorted(found)]


_OTHERS = _other_plugins()
