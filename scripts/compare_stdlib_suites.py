"""Run CPython's own tests of sockets and of what is built on them, without and with the guard.

Each module runs in a process of its own, and the outcomes are compared test by test. Where they
differ, both sides run once more, so that a test which fails now and then is no finding. The exit
code is 1 if a difference is stable or a process broke off, else 0. Nothing goes beyond loopback.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

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

# A virtual machine that cannot reach itself by its context id waits in accept() without a timeout.
HANGING = {"test_socket": ("ThreadedVSOCKSocketStreamTest",)}

# Not "network" and "urlfetch", with which tests go out to the Internet. test_socketserver asks for
# "network" as a whole, though it keeps to loopback.
RESOURCES = ("cpu", "largefile", "subprocess", "walltime")
MORE_RESOURCES = {"test_socketserver": ("network",)}

# A module that ran through has this one more outcome.
PROCESS = "<process>"
RAN_THROUGH = "ran through"
NOT_RUN = "not run"

_LOOKUPS = {
    f"socket.{name}" for name in ("getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo")
}
_SENDINGS = {f"socket.{name}" for name in ("connect", "sendto", "sendmsg")}
_OWN_NAMES = ("", "localhost", socket.gethostname())
_INTERNET = (socket.AF_INET, socket.AF_INET6)

_ADDRESS = re.compile(r"0x[0-9a-f]+")
_CHANGING = re.compile(r"0x[0-9a-f]+|\d+|laddr=.*")

_Error = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]


# What happens in a process that runs one module.


class Recorder(unittest.TestResult):
    """Writes each outcome down at once: what a crash or a hang leaves behind is still true."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._pid = os.getpid()

    def record(self, **what: object) -> None:
        """Write a line, unless this is a child that a test has forked and lost."""
        if os.getpid() == self._pid and not self._file.closed:
            self._file.write(json.dumps(what) + "\n")

    def close(self) -> None:
        """Write the last line."""
        self.record(test=PROCESS, kind=RAN_THROUGH)
        self._file.close()

    def _outcome(self, test: unittest.TestCase, kind: str, detail: str = "") -> None:
        # A subtest counts for the test that it is a part of.
        whole = getattr(test, "test_case", test)
        if whole is not test:
            part = test.id().removeprefix(whole.id())
            kind = f"{kind} in subtest{_ADDRESS.sub('0x#', part)}"
        self.record(test=whole.id(), kind=kind, detail=detail)

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        super().startTest(test)
        self.record(test=test.id())

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        self._outcome(test, "pass")

    def addFailure(self, test: unittest.TestCase, err: _Error) -> None:  # noqa: N802
        self._outcome(test, "fail", _text(err))

    def addError(self, test: unittest.TestCase, err: _Error) -> None:  # noqa: N802
        self._outcome(test, "error", _text(err))

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        self._outcome(test, "skip", reason)

    def addExpectedFailure(self, test: unittest.TestCase, err: _Error) -> None:  # noqa: N802
        self._outcome(test, "expected failure", _text(err))

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        self._outcome(test, "unexpected success")

    def addSubTest(  # noqa: N802
        self, test: unittest.TestCase, subtest: unittest.TestCase, err: _Error | None
    ) -> None:
        if err is not None and err[0] is not None:
            failed = issubclass(err[0], test.failureException)
            self._outcome(subtest, "fail" if failed else "error", _text(err))


def _text(err: _Error) -> str:
    return "".join(traceback.format_exception(*err))


def run_here(module: str, classes: tuple[str, ...], results: Path, *, guarded: bool) -> None:
    """Run one module's tests in this process, and write what happens to a file of JSON lines."""
    if guarded:
        guard = importlib.import_module("closewait_guard")
        guard.install()
    recorder = Recorder(results)
    _record_resource_warnings(recorder)
    sys.addaudithook(_stay_on_loopback)
    support: Any = importlib.import_module("test.support")
    support.use_resources = [*RESOURCES, *MORE_RESOURCES.get(module, ())]
    support.verbose = False
    support.record_original_stdout(sys.stdout)
    # Beside the results, so that it goes with them even if this process is killed.
    with importlib.import_module("test.support.os_helper").temp_cwd(str(results) + ".cwd"):
        try:
            suite = _load(module, classes)
        except unittest.SkipTest as skip:
            recorder.record(test=f"test.{module}", kind="skip", detail=str(skip))
        else:
            suite.run(recorder)
        support.gc_collect()
        support.reap_children()
    if guarded:
        coverage = guard.scan().coverage
        recorder.record(births=coverage.births, failures=coverage.failures)
    recorder.close()


def _load(module: str, classes: tuple[str, ...]) -> unittest.TestSuite:
    loader = unittest.TestLoader()
    loaded = importlib.import_module(f"test.{module}")
    for name in HANGING.get(module, ()):
        unittest.skip("may wait for ever")(getattr(loaded, name))
    if not classes:
        return loader.loadTestsFromModule(loaded)
    return loader.loadTestsFromNames(classes, loaded)


def _stay_on_loopback(event: str, args: tuple[Any, ...]) -> None:
    """Refuse what goes beyond: tests of bad host names ask the name server without "network"."""
    if event in _LOOKUPS:
        host = _host(args[0][0] if event == "socket.getnameinfo" else args[0])
        if isinstance(host, str):
            raise socket.gaierror(socket.EAI_NONAME, "kept from asking a name server")
    elif event in _SENDINGS and args[1] and args[0].family in _INTERNET:
        host = _host(args[1][0])
        if isinstance(host, str) or not (host.is_loopback or host.is_unspecified):
            raise OSError(errno.ENETUNREACH, "kept from going beyond loopback")


def _host(host: object) -> ipaddress.IPv4Address | ipaddress.IPv6Address | str:
    """The address of a host that no name server need be asked for, else its name."""
    name = host.decode("latin-1") if isinstance(host, (bytes, bytearray)) else str(host or "")
    try:
        return ipaddress.ip_address("127.0.0.1" if name in _OWN_NAMES else name)
    except ValueError:
        return name


def _record_resource_warnings(recorder: Recorder) -> None:
    show = warnings.showwarning

    def record(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, ResourceWarning):
            recorder.record(warning=_CHANGING.sub("#", str(message)))
        show(message, category, *args, **kwargs)

    warnings.showwarning = record


# What happens in the process that compares.


@dataclass
class Run:
    """What one process has left behind."""

    kinds: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    warnings: Counter[str] = field(default_factory=Counter)
    births: int = 0
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
            self.births, self.failures = line["births"], line["failures"]


def run_in_process(module: str, classes: tuple[str, ...], limit: float, *, guarded: bool) -> Run:
    """Run one module's tests in a new process, for at most `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        results, output = Path(folder, "results"), Path(folder, "output")
        # The warnings as regrtest has them, but each ResourceWarning counts.
        command = [sys.executable, "-X", "faulthandler", "-bb", "-W", "default"]
        command += ["-W", "always::ResourceWarning", __file__, "--results", str(results)]
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

    def judged(self, verdict: str) -> list[str]:
        """The tests of one verdict. How the process ended is judged like a test."""
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
        return bool(self.judged("differing")) or any(
            all(run.broken for run in runs) for _, runs in self.sides()
        )


def compare(module: str, classes: tuple[str, ...], limit: float) -> Comparison:
    """Run a module on both sides, and once more on both if they differ."""
    comparison = Comparison(module, [], [])
    for _ in range(2):
        comparison.plain.append(run_in_process(module, classes, limit, guarded=False))
        comparison.guarded.append(run_in_process(module, classes, limit, guarded=True))
        if len(comparison.judged("identical")) == len(comparison.tests()) + 1:
            break
    return comparison


def describe(comparison: Comparison) -> Iterator[str]:
    """Say of every test that is not alike what happened on both sides."""
    if reason := comparison.plain[0].details.get(f"test.{comparison.module}"):
        yield f"{comparison.module} is skipped as a whole: {reason}"
    for verdict in ("differing", "not reproduced", "flaky"):
        for test in comparison.judged(verdict):
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
    """One line per module. Births tell that the guard was at work."""
    yield _COLUMNS.format(
        *("module", "tests", "pass", "skip", "other", "identical", "differing", "flaky"),
        *("births", "warnings"),
    )
    for one in comparisons:
        tests, plain, guarded = one.tests(), one.plain[0], one.guarded[0]
        passed, skipped = one.ended("pass"), one.ended("skip")
        differing = len(one.judged("differing"))
        alike = sum(one.verdict(test) == "identical" for test in tests)
        yield _COLUMNS.format(
            *(one.module, len(tests), passed, skipped, len(tests) - passed - skipped),
            *(alike, differing, len(tests) - alike - differing, guarded.births),
            f"{plain.warnings.total()}/{guarded.warnings.total()}",
        )


def main() -> int:
    """Compare the modules that the command line asks for, or be one of the processes."""
    options = _parser().parse_args()
    if options.results is not None:
        module, *classes = options.modules
        run_here(module, tuple(classes), options.results, guarded=options.guarded)
        return 0
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
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--guarded", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
