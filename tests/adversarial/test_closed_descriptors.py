"""A program closes all descriptors that it does not know, and opens files of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no such signal")

PROGRAM = """
import os, resource, signal, sys, time
import closewait_guard as cwg

folder, ending = sys.argv[1:]
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (5000, most))
# The program's own, which it leaves open.
kept = os.open(folder + "/kept", os.O_WRONLY | os.O_CREAT)
os.dup2(kept, 4999)
signal.signal(signal.SIGUSR2, lambda *_: None)
guard = cwg.install(signal="SIGUSR1", reporters=["json_lines:" + folder + "/leaks.jsonl"])
monitor = cwg.watch(interval=0.1)
time.sleep(0.3)

os.closerange(3, 4096)
theirs = [os.open(f"{folder}/{n}", os.O_RDWR | os.O_CREAT) for n in range(1200)]
identities = [os.fstat(fd)[:3] for fd in theirs]

for _ in range(5):
    signal.raise_signal(signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.02)

def check():
    assert [os.fstat(fd)[:3] for fd in theirs] == identities
    assert not any(os.fstat(fd).st_size for fd in theirs)
    os.fstat(4999)

check()
if ending == "stop":
    monitor.stop()
    check()
if ending != "exit":
    cwg.uninstall()
    check()
    assert signal.set_wakeup_fd(-1) == -1
    with cwg.watch(interval=0.1, signal="SIGUSR1"):
        time.sleep(0.2)
        check()
    cwg.uninstall()
    check()
"""


@pytest.mark.parametrize("ending", ["stop", "uninstall", "exit"])
def test_no_byte_of_ours_is_in_its_files_and_none_is_closed(ending, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), ending],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "closewait-guard: no leaks" in done.stderr or "leaked socket" in done.stderr
    written = {path.name for path in tmp_path.iterdir() if path.stat().st_size}
    assert written <= {"leaks.jsonl"}


SUITE = """
import os, socket

theirs = []


def identities():
    return [(os.fstat(fd)[:3], os.fstat(fd).st_size) for fd in theirs]


def test_that_closes_all(tmp_path):
    # All but that of pytest, which closes its own by number at its end.
    os.closerange(4, 4096)
    theirs.extend(os.open(tmp_path / str(n), os.O_RDWR | os.O_CREAT) for n in range(100))
    global before
    before = identities()


def test_that_leaks():
    socket.socket()
    assert identities() == before


def test_that_keeps(request):
    request.config.theirs = socket.create_server(("127.0.0.1", 0))
    assert identities() == before
"""
LAST_LOOK = """
import atexit, os
import pytest

def pytest_configure(config):
    atexit.register(look)

@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    look()

def look():
    import test_suite
    try:
        is_well = test_suite.identities() == test_suite.before
    except OSError:
        is_well = False
    if not is_well:
        os._exit(99)
"""


@pytest.mark.parametrize("mode", ["warn", "fail"])
def test_the_plugin_closes_and_fills_nothing_of_a_test_that_closes_all(mode, tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "conftest.py").write_text(LAST_LOOK)
    # Other plugins close what they had opened; pytest the files that it captures output in.
    options = ["-p", "no:faulthandler", "-p", "no:cacheprovider", "-s"]
    options += ["-p", "closewait_guard.pytest_plugin"]
    options += [f"--socket-leaks={mode}", f"--socket-leaks-json={tmp_path / 'leaks.json'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_suite.py"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert done.returncode == (1 if mode == "fail" else 0), done.stdout + done.stderr
    assert "test_that_leaks" in done.stdout
