"""Suites that leak, run inside the test; their sockets are closed afterwards."""

from __future__ import annotations

import contextlib
import gc

# Stays imported: what an inner run imports is taken out of sys.modules again, but not out of the
# package `http`, and an import of requests then gets two of it and does not know its own cookies.
import http.cookiejar  # noqa: F401
import json
import os
import socket
import sys

import pytest

from closewait_guard.pytest_plugin import _lazy_start

PRELUDE = """\
import asyncio, gc, socket, threading, time
import pytest

KEPT = []


def keep(thing):
    KEPT.append(thing)
    return thing


def listener():
    return socket.create_server(("127.0.0.1", 0))


class Pool:
    def __init__(self):
        self.server = listener()
        self.free = []

    def connection(self):
        if not self.free:
            self.free.append(socket.create_connection(self.server.getsockname()))
        return self.free[0]

    def close(self):
        for sock in (self.server, *self.free):
            sock.close()


"""
# For programs and suites that have `atexit`, `contextlib`, `os`, `time` and `listener()`.
FORKING = """
CHILDREN = []

def connect():
    with listener() as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]

def fork(work=lambda: time.sleep(60)):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    CHILDREN.append(child)
    return child

def end(child):
    if child in CHILDREN:
        CHILDREN.remove(child)
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        os.kill(child, 9)
        os.waitpid(child, 0)

def end_children():
    while CHILDREN:
        end(CHILDREN[-1])

atexit.register(end_children)
"""
QUIET = ("-p", "no:cacheprovider", "-W", "ignore")
PLUGIN = "closewait_guard.pytest_plugin"


def open_sockets():
    """Sockets, and what tests keep them by, that this process has at this moment."""
    return {id(thing): thing for thing in gc.get_objects() if type(thing) is socket.socket}


def descriptors():
    """The sockets that are open, by number: only where the system says (Linux)."""
    opened = {}
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        # The listing's own descriptor is gone by now.
        with contextlib.suppress(OSError):
            opened[int(number)] = os.readlink(f"/proc/self/fd/{number}")
    return {number: what for number, what in opened.items() if what.startswith("socket:")}


class Suite:
    """Runs pytest on a test module that begins with the prelude."""

    def __init__(self, pytester):
        self.pytester = pytester
        self.run_apart = pytester.runpytest_subprocess

    def write(self, source, name="test_it"):
        self.pytester.makepyfile(**{name: PRELUDE + source})

    def fail(self, source, *options, **kwargs):
        """With `--socket-leaks=fail` and a short grace time."""
        return self.run(
            source, "--socket-leaks=fail", "--socket-leaks-grace=0.05", *options, **kwargs
        )

    def run(self, source, *options, apart=False):
        if source is not None:
            self.write(source)
        ours = ("-p", PLUGIN) if "PYTEST_DISABLE_PLUGIN_AUTOLOAD" in os.environ else ()
        run = self.run_apart if apart else self.pytester.runpytest_inprocess
        return run(*QUIET, *ours, *options)

    def findings(self, source, *options):
        """The lines of the JSON file, of a run that fails tests."""
        self.fail(source, "--socket-leaks-json=leaks.jsonl", *options)
        text = (self.pytester.path / "leaks.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def suite(pytester, monkeypatch):
    """A place for a suite of its own. What it leaks is closed at the end of the test."""
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    # Only what a test names: it is faster, and it is known what runs.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    # What this process has imported for other tests is not what the inner run has.
    monkeypatch.setattr(_lazy_start, "_NATIVE_DRIVERS", ())
    before, numbers = open_sockets(), descriptors()
    yield Suite(pytester)
    # Some hang on the traceback of the last failure of the inner run.
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        vars(sys).pop(name, None)
    for address, sock in open_sockets().items():
        if before.get(address) is not sock:
            while sock._io_refs:
                sock._decref_socketios()
            sock.close()
    for number, _ in descriptors().items() - numbers.items():
        os.close(number)
