"""Run one of CPython's own test modules, and write each outcome to a file of JSON lines.

`compare_stdlib_suites.py` starts this in a process of its own. Nothing goes beyond loopback.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import ipaddress
import json
import os
import re
import socket
import sys
import traceback
import unittest
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

# A virtual machine that cannot reach itself by its context id waits in accept() without a timeout.
HANGING = {"test_socket": ("ThreadedVSOCKSocketStreamTest",)}

# Not "network" and "urlfetch", with which tests go out to the Internet. test_socketserver asks for
# "network" as a whole, though it keeps to loopback.
RESOURCES = ("cpu", "largefile", "subprocess", "walltime")
MORE_RESOURCES = {"test_socketserver": ("network",)}

# A module that ran through has this one more outcome.
PROCESS = "<process>"
RAN_THROUGH = "ran through"

_LOOKUPS = {
    f"socket.{name}" for name in ("getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo")
}
_SENDINGS = {f"socket.{name}" for name in ("connect", "sendto", "sendmsg")}
_OWN_NAMES = ("", "localhost", socket.gethostname())
_INTERNET = (socket.AF_INET, socket.AF_INET6)

_ADDRESS = re.compile(r"0x[0-9a-f]+")
_CHANGING = re.compile(r"0x[0-9a-f]+|\d+|laddr=.*")

_Error = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]


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
        recorder.record(opened=coverage.opened, failures=coverage.failures)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="the file to write")
    parser.add_argument("module")
    parser.add_argument("classes", nargs="*", help="only these classes of the module")
    parser.add_argument("--guarded", action="store_true", help="install the guard first")
    options = parser.parse_args()
    run_here(options.module, tuple(options.classes), options.results, guarded=options.guarded)


if __name__ == "__main__":
    main()
