"""A signal prints a report, and calls the handler that was there, which is restored at the end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import closewait_guard as cwg
from closewait_guard._signal import EarlyLooks
from closewait_guard._signal import report as _signal
from findings import reports_in

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no such signal")


@pytest.fixture(autouse=True)
def signals_are_as_before():
    before = signal.getsignal(signal.SIGUSR1)
    yield
    cwg.uninstall()
    assert signal.getsignal(signal.SIGUSR1) is before
    assert signal.set_wakeup_fd(-1) == -1


def printed(capfd, seconds=30.0):
    """What is on stderr as soon as a whole report is there."""
    text, end = "", time.monotonic() + seconds
    while not reports_in(text):
        assert time.monotonic() < end, text
        time.sleep(0.01)
        text += capfd.readouterr().err
    return text


def test_the_report_is_printed_and_the_handler_that_was_there_is_called(capfd):
    called = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: called.append(number))
    try:
        cwg.install(signal=signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert "no leaks (" in printed(capfd)
        assert called == [signal.SIGUSR1]
        cwg.uninstall()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_without_an_earlier_handler_the_signal_does_not_end_the_program(capfd):
    cwg.install(signal="USR1")
    os.kill(os.getpid(), signal.SIGUSR1)
    printed(capfd)


def test_one_signal_prints_one_report_while_a_monitor_runs(capfd):
    cwg.install(signal="SIGUSR1")
    with cwg.watch(interval=3600, at_exit=False):
        os.kill(os.getpid(), signal.SIGUSR1)
        text = printed(capfd)
        time.sleep(0.2)
        text += capfd.readouterr().err
    assert len(reports_in(text)) == 1


# What stderr is to such a program: a file that it can read.
WAITS = """
import os, time

def wait_for_a_report(seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with open("/dev/stderr") as file:
            if "no leaks" in file.read():
                break
        time.sleep(0.02)
"""


def run(program, path, *arguments):
    """A program's exit code, and what it wrote to stderr."""
    with path.open("wb") as stderr:
        command = [sys.executable, "-c", WAITS + program, *arguments]
        done = subprocess.run(command, stderr=stderr, timeout=120)
    return done.returncode, path.read_text()


STUCK = """
import ctypes, os, signal, sys, threading, time
import closewait_guard as cwg
from closewait_guard._signal import EarlyLooks
from closewait_guard._signal import report as _signal
cwg.install(signal="SIGUSR1")
if sys.argv[1] == "monitor":
    cwg.watch(interval=3600, at_exit=False)
# A call that releases the interpreter's lock, and that no signal ends: a mutex that is taken.
posix, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
posix.pthread_mutex_lock(mutex)

def signal_and_unlock():
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGUSR1)
    # Only a monitor reports before the call ends.
    wait_for_a_report(30 if sys.argv[1] == "monitor" else 1)
    print("the call ends", file=sys.stderr, flush=True)
    posix.pthread_mutex_unlock(mutex)

threading.Thread(target=signal_and_unlock).start()
posix.pthread_mutex_lock(mutex)
wait_for_a_report(30)
"""


@pytest.mark.parametrize("with_monitor", ["monitor", "no monitor"])
def test_a_main_thread_stuck_in_a_call_delays_no_report_while_a_monitor_runs(
    with_monitor, tmp_path
):
    code, text = run(STUCK, tmp_path / "stderr", with_monitor)
    assert code == 0, text
    report, end = text.find("no leaks ("), text.find("the call ends")
    assert min(report, end) >= 0, text
    assert (report < end) is (with_monitor == "monitor")


def test_an_event_loop_that_takes_the_wakeup_descriptor_is_left_alone(capfd):
    caught = []

    async def main():
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR2, caught.append, 1)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        while not caught:
            await asyncio.sleep(0.01)
        loop.remove_signal_handler(signal.SIGUSR2)

    cwg.install(signal="SIGUSR1")
    with cwg.watch(interval=3600, at_exit=False):
        asyncio.run(asyncio.wait_for(main(), 30))
        printed(capfd)
        # The loop has unset the descriptor; the next signal is caught all the same.
        os.kill(os.getpid(), signal.SIGUSR1)
        printed(capfd)
    assert caught == [1]


def test_an_event_loop_that_has_the_wakeup_descriptor_keeps_it(capfd):
    caught = []

    async def main():
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR2, caught.append, 1)
        with cwg.watch(interval=3600, at_exit=False, signal="SIGUSR1"):
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGUSR1)
            while not caught:
                await asyncio.sleep(0.01)
        loop.remove_signal_handler(signal.SIGUSR2)

    asyncio.run(asyncio.wait_for(main(), 30))
    printed(capfd)
    assert caught == [1]


def test_after_uninstall_a_later_handler_can_still_call_ours_which_calls_the_earlier_one(capfd):
    called = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: called.append("earlier"))
    try:
        cwg.install(signal="SIGUSR1")
        ours = signal.getsignal(signal.SIGUSR1)

        def later(number, frame):
            called.append("later")
            ours(number, frame)

        signal.signal(signal.SIGUSR1, later)
        cwg.uninstall()
        assert signal.getsignal(signal.SIGUSR1) is later
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.1)
        assert called == ["later", "earlier"]
        assert "no leaks" not in capfd.readouterr().err
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_thread_cannot_install_it_and_nothing_is_installed():
    raised = []

    def install():
        try:
            cwg.install(signal="SIGUSR1")
        except cwg.ConfigurationError as error:
            raised.append(str(error))

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    [sentence] = raised
    assert sentence.startswith("signal: SIGUSR1 cannot be handled: signal only works in main")


@pytest.mark.parametrize("name", ["SIGNONE", "99", "SIGKILL"])
def test_a_signal_that_cannot_be_caught_is_refused_in_one_sentence(name):
    with pytest.raises(cwg.ConfigurationError, match=r"signal"):
        cwg.install(signal=name)


def test_the_signal_can_be_named_in_the_environment(monkeypatch, capfd):
    monkeypatch.setenv("CLOSEWAIT_GUARD_SIGNAL", "usr1")
    cwg.install()
    os.kill(os.getpid(), signal.SIGUSR1)
    printed(capfd)


FORKS = """
import signal
import closewait_guard as cwg
from closewait_guard._signal import EarlyLooks
from closewait_guard._signal import report as _signal
cwg.install(signal="SIGUSR1")
cwg.watch(interval=3600, at_exit=False)
child = os.fork()
if child == 0:
    os.kill(os.getpid(), signal.SIGUSR1)
    wait_for_a_report(30)
    time.sleep(0.3)
    os._exit(0)
os.waitpid(child, 0)
time.sleep(0.2)
"""


def test_a_signal_to_a_forked_child_is_reported_by_the_child_alone(tmp_path):
    code, text = run(FORKS, tmp_path / "stderr")
    assert code == 0
    assert len(reports_in(text)) == 1, text


def test_a_reader_that_ends_late_leaves_no_descriptor(monkeypatch):
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(_signal, "_MAX_JOIN_SECONDS", 0)
    for _ in range(5):
        with cwg.watch(interval=3600, signal="SIGUSR1", at_exit=False):
            time.sleep(0.01)
        cwg.uninstall()
    end = time.monotonic() + 30
    # What was left open by an earlier test may be closed meanwhile.
    while more := set(os.listdir("/proc/self/fd")) - before:
        assert time.monotonic() < end, more
        time.sleep(0.01)


class Counting:
    """A guard that counts its scans, each of which takes a while."""

    def __init__(self, guard, seconds=0.0):
        self.guard, self.seconds, self.scans = guard, seconds, 0

    def scan(self):
        self.scans += 1
        time.sleep(self.seconds)
        return self.guard.scan()

    def _record_state(self, report):
        pass


@pytest.fixture
def looks():
    made = []

    def make(guard):
        made.append(EarlyLooks(guard))
        return made[-1]

    yield make
    for each in made:
        each.stop()


async def leave_open(address):
    await asyncio.get_running_loop().create_connection(asyncio.Protocol, *address)
    await asyncio.sleep(0.05)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_only_a_loop_that_has_connections_is_looked_at_before_it_is_closed(looks):
    with (
        cwg.Guard(cwg.Settings(grace=0)) as guard,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        counting = Counting(guard)
        looks(counting)
        asyncio.run(asyncio.sleep(0))
        assert counting.scans == 0
        asyncio.run(leave_open(server.getsockname()))
        gc.collect()
        assert counting.scans == 1


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_looks_at_loops_take_a_small_share_of_the_time_and_say_what_they_left_out(looks):
    with (
        cwg.Guard(cwg.Settings(grace=0)) as guard,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        counting = Counting(guard, seconds=1.1)
        early = looks(counting)
        for _ in range(4):
            asyncio.run(leave_open(server.getsockname()))
        gc.collect()
        assert counting.scans == 2
        assert early.failures == (
            "what closing event loops has closed: looking would take more than 5 % of the time",
        )
