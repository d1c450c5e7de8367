"""What every test can rely on: a pristine socket class before and after, and real leaks."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import threading

import pytest

import closewait_guard as cwg
from closewait_guard._capture import patch
from closewait_guard._capture.hooks import SOCKET, listener_in_accept_by_thread
from closewait_guard._live import gc_objects
from suites import descriptors, suite  # noqa: F401 - a fixture

# In a program with httpx2, the resolver of eventlet imports trio, which lacks a method then.
os.environ.setdefault("EVENTLET_NO_GREENDNS", "yes")


def pytest_report_header():
    return f"closewait_guard: {cwg.__file__}"


def pytest_configure():
    """The installed package is what must be tested, not a checkout that stands in front of it."""
    if os.environ.get("EXPECT_INSTALLED"):
        assert "site-packages" in cwg.__file__, cwg.__file__


def pytest_collection_finish():
    """What the imports have left behind stays; no collection between two tests need look at it."""
    gc.collect()
    gc.freeze()


# They start programs and servers, or run whole pages: minutes, not seconds.
WHOLE_PROGRAMS = {
    f"test_{name}"
    for name in (
        "attached_servers",
        "command_line",
        "documents",
        "event_loops",
        "forks",
        "last_report",
        "launch",
        "metrics_of_servers",
        "native_sockets",
        "page_in_browser",
        "plugin_beside_others",
        "pools",
        "real_programs",
        "report_command",
        "report_files",
        "root_causes",
        "run",
        "running_calls",
        "scan",
        "soak",
        "verdict_of_run",
        "watch",
        "watch_web",
        "workers",
    )
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`pytest` runs the others; `pytest -m whole_program` these."""
    for item in items:
        if item.path.stem in WHOLE_PROGRAMS:
            item.add_marker("whole_program")


PRISTINE = dict(vars(SOCKET))


def assert_pristine() -> None:
    assert socket.socket is SOCKET
    assert not patch.is_patched()
    assert not listener_in_accept_by_thread
    assert dict(vars(SOCKET)) == PRISTINE
    assert all(vars(SOCKET)[name] is value for name, value in PRISTINE.items())
    assert SOCKET._real_close.__defaults__ == (SOCKET.__base__,)


def run_apart(code):
    """In an interpreter of its own; what fails there fails here."""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture(scope="session", autouse=True)
def large_heaps_may_be_asked():
    """On a busy machine a question to the heap takes so long that it is not asked any more."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gc_objects, "_MAX_STOP", 10.0)
        yield


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    """No test leaves the socket class patched, or a thread or an open socket behind."""
    # What the test before has left in cycles, and pytest has let go of only after its end.
    gc.collect()
    assert_pristine()
    threads, numbers = set(threading.enumerate()), descriptors()
    yield
    gc.collect()
    try:
        assert_pristine()
    finally:
        # What the next tests would be accused of.
        cwg.uninstall()
    assert set(threading.enumerate()) <= threads
    assert descriptors().items() <= numbers.items()


@pytest.fixture
def guard():
    """A guard of the test's own, with a grace time that a test can wait for."""
    with cwg.Guard(cwg.Settings(grace=0.05)) as installed:
        yield installed


@pytest.fixture(params=["linux", "portable"])
def probed_guard(request):
    """The same, once with each probe."""
    with cwg.Guard(cwg.Settings(grace=0.05, probe=request.param)) as installed:
        yield installed


@pytest.fixture(autouse=True)
def time_to_search(monkeypatch):
    """The heap of a test run is large and the machine busy: a search may take longer than usual."""
    from closewait_guard._holders import explain

    monkeypatch.setattr(explain, "_MAX_SECONDS", 10.0)


@pytest.fixture
def attack_seconds():
    """How long a test marked `long` goes on: the environment says, CI less than a thorough run."""
    return float(os.environ.get("ATTACK_SECONDS", "20"))
