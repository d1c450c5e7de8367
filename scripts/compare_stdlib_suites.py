"""Run CPython's own tests of sockets and of what is built on them, without and with the guard.

Each module runs in a process of its own, and the outcomes are compared test by test. Where they
differ, both sides run once more, so that a test which fails now and then is no finding. The exit
code is 1 if a difference is stable or a process broke off, else 0. Nothing goes beyond loopback.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from run_stdlib_suite import PROCESS

MODULES = (
    "test_socket",
    "test_ssl",
    "test_httplib",
    "test_socketserver",
    "test_selectors",
    "test_ftplib",
    "test_smtplib",
    "test_asyncio",
)

# Of the modules that take long only these classes.
QUICK: dict[str, tuple[str, ...]] = {
    "test_selectors": ("EpollSelectorTestCase", "SelectSelectorTestCase"),
    "test_socketserver": (),
    "test_httplib": (),
    "test_smtplib": (),
    "test_socket": (
        "GeneralModuleTests",
        "BasicTCPTest",
        "BasicUDPTest",
        "BasicSocketPairTest",
        "BufferIOTest",
        "NonBlockingTCPTests",
        "FileObjectClassTestCase",
        "NetworkConnectionAttributesTest",
        "ContextManagersTest",
        "CreateServerFunctionalTest",
        "InheritanceTest",
        "NonblockConstantTest",
        "RecvmsgSCMRightsStreamTest",
        "SendfileUsingSendTest",
        "SendRecvFdsTests",
        "TestUnixDomain",
    ),
    "test_ssl": ("BasicSocketTests", "ContextTests", "MemoryBIOTests", "SimpleBackgroundTests"),
}


NOT_RUN = "not run"
_CHILD = Path(__file__).with_name("run_stdlib_suite.py")


@dataclass
class Run:
    """What one process has left behind."""

    kinds: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    warnings: Counter[str] = field(default_factory=Counter)
    opened: int = 0
    failures: int = 0
    broken: str = ""

    def outcome(self, test: str) -> str:
        """All that was said of a test, in one line."""
        kinds = self.kinds.get(test)
        return NOT_RUN if kinds is None else ", ".join(sorted(kinds)) or "did not finish"

    def take(self, line: dict[str, Any]) -> None:
        """Take one line of the results in."""
        if "test" in line:
            kinds = self.kinds.setdefault(line["test"], [])
            if "kind" in line:
                kinds.append(line["kind"])
                self.details[line["test"]] = line.get("detail", "")
        elif "warning" in line:
            self.warnings[line["warning"]] += 1
        else:
            self.opened, self.failures = line["opened"], line["failures"]


def run_in_process(module: str, classes: tuple[str, ...], limit: float, *, guarded: bool) -> Run:
    """Run one module's tests in a new process, for at most `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        results, output = Path(folder, "results"), Path(folder, "output")
        # The warnings as regrtest has them, but each ResourceWarning counts.
        command = [sys.executable, "-X", "faulthandler", "-bb", "-W", "default"]
        command += ["-W", "always::ResourceWarning", str(_CHILD), str(results)]
        command += ["--guarded"] * guarded + [module, *classes]
        with output.open("wb") as stream:
            ended = _ended(command, stream.fileno(), limit)
        run = Run()
        for line in results.read_text("utf-8").splitlines() if results.exists() else ():
            run.take(json.loads(line))
        if ended or PROCESS not in run.kinds:
            run.kinds[PROCESS] = [ended or "broke off"]
            run.broken = ended or "broke off"
            run.details[PROCESS] = output.read_text("utf-8", errors="replace")
        return run


def _ended(command: list[str], output: int, limit: float) -> str:
    """Run a command; say how it went wrong, if it did."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        # The tests have children of their own, which must not outlive them.
        start_new_session=True,
    )
    try:
        code = process.wait(limit)
        return f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        # faulthandler writes where it hangs.
        process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        return f"ended after {limit:g} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass
class Comparison:
    """One module's runs without and with the guard, a second pair if the first differed."""

    module: str
    plain: list[Run]
    guarded: list[Run]

    def tests(self) -> list[str]:
        """All tests that any of the runs knows."""
        runs = (*self.plain, *self.guarded)
        return sorted({test for run in runs for test in run.kinds} - {PROCESS})

    def with_verdict(self, verdict: str) -> list[str]:
        """The tests of one verdict. How the process ended counts as a test."""
        return [test for test in (*self.tests(), PROCESS) if self.verdict(test) == verdict]

    def sides(self) -> tuple[tuple[str, list[Run]], ...]:
        """Both sides, each with the words for it."""
        return ("without the guard", self.plain), ("with the guard", self.guarded)

    def verdict(self, test: str) -> str:
        """Whether the guard changes the outcome of a test."""
        plain = {run.outcome(test) for run in self.plain}
        guarded = {run.outcome(test) for run in self.guarded}
        if plain == guarded and len(plain) == 1:
            return "identical"
        if len(plain) > 1:
            return "flaky"
        return "not reproduced" if plain & guarded else "differing"

    def ended(self, kind: str) -> int:
        """How many tests ended so in the first run without the guard."""
        return sum(self.plain[0].outcome(test) == kind for test in self.tests())

    @property
    def fails(self) -> bool:
        """Whether the guard changes anything, or nothing could be compared."""
        return bool(self.with_verdict("differing")) or any(
            all(run.broken for run in runs) for _, runs in self.sides()
        )


def compare(module: str, classes: tuple[str, ...], limit: float) -> Comparison:
    """Run a module on both sides, and once more on both if they differ."""
    comparison = Comparison(module, [], [])
    for _ in range(2):
        comparison.plain.append(run_in_process(module, classes, limit, guarded=False))
        comparison.guarded.append(run_in_process(module, classes, limit, guarded=True))
        if len(comparison.with_verdict("identical")) == len(comparison.tests()) + 1:
            break
    return comparison


def describe(comparison: Comparison) -> Iterator[str]:
    """Say of every test that is not alike what happened on both sides."""
    if reason := comparison.plain[0].details.get(f"test.{comparison.module}"):
        yield f"{comparison.module} is skipped as a whole: {reason}"
    for verdict in ("differing", "not reproduced", "flaky"):
        for test in comparison.with_verdict(verdict):
            yield f"{verdict}: {test}"
            for side, runs in comparison.sides():
                yield f"    {side}: {' / '.join(run.outcome(test) for run in runs)}"
            yield from _last_detail(test, (*comparison.guarded, *comparison.plain))
    for side, runs in comparison.sides():
        for run in runs:
            if run.broken:
                yield f"{comparison.module} {side}: {run.broken}"
                yield from _last_detail(PROCESS, [run])
            if run.failures:
                yield f"{comparison.module} {side}: {run.failures} times it failed to record"
    yield from _describe_warnings(comparison)


def _last_detail(test: str, runs: Iterable[Run]) -> Iterator[str]:
    detail = next((run.details[test] for run in runs if run.details.get(test)), "")
    for line in detail.splitlines()[-25:]:
        yield f"      | {line}"


def _describe_warnings(comparison: Comparison) -> Iterator[str]:
    """For information only: when the collector runs is not the same twice."""
    plain, guarded = comparison.plain[0].warnings, comparison.guarded[0].warnings
    for text in sorted(plain.keys() | guarded.keys()):
        if plain[text] != guarded[text]:
            yield f"ResourceWarnings {plain[text]} -> {guarded[text]}: {text}"


_COLUMNS = "{:<18}{:>7}{:>7}{:>7}{:>7}{:>11}{:>11}{:>7}{:>8}{:>11}"


def table(comparisons: Iterable[Comparison]) -> Iterator[str]:
    """One line per module. The sockets opened show that the guard was at work."""
    yield _COLUMNS.format(
        *("module", "tests", "pass", "skip", "other", "identical", "differing", "flaky"),
        *("opened", "warnings"),
    )
    for one in comparisons:
        tests, plain, guarded = one.tests(), one.plain[0], one.guarded[0]
        passed, skipped = one.ended("pass"), one.ended("skip")
        differing = len(one.with_verdict("differing"))
        alike = sum(one.verdict(test) == "identical" for test in tests)
        yield _COLUMNS.format(
            *(one.module, len(tests), passed, skipped, len(tests) - passed - skipped),
            *(alike, differing, len(tests) - alike - differing, guarded.opened),
            f"{plain.warnings.total()}/{guarded.warnings.total()}",
        )


def main() -> int:
    """Compare the modules that the command line asks for."""
    options = _parser().parse_args()
    # So that what is running is ended too, and its folder removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for needed in ("test.support", "closewait_guard"):
        importlib.import_module(needed)
    started = time.monotonic()
    comparisons = []
    for module in options.modules or (QUICK if options.quick else MODULES):
        print(f"{module} ...", flush=True)
        classes = QUICK.get(module, ()) if options.quick else ()
        comparisons.append(compare(module, classes, options.timeout))
        for line in describe(comparisons[-1]):
            print(line, flush=True)
    print(*table(comparisons), sep="\n")
    print(f"Python {sys.version.split()[0]}, {time.monotonic() - started:.0f} s")
    return int(any(one.fails for one in comparisons))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="module", help=f"of {', '.join(MODULES)}")
    parser.add_argument("--quick", action="store_true", help="a selection of modules and classes")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each process")
    return parser


if __name__ == "__main__":
    sys.exit(main())
