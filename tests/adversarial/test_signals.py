"""Reports by signal take nothing away from the program, and never hold it up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import closewait_guard as cwg
from closewait_guard._signal import report as _signal

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="none of them is queued")


def run(code, *arguments, timeout=60.0, **options):
    """In an interpreter of its own, as a main thread with signals is needed."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )


# From outside, so that one comes in the middle of another's handler. Those of real time are queued,
# once for each that is sent; but a loop's socket has room for some hundreds only.
SENDER = """
import os, select, signal, sys, time
pid, seconds, most = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
end, sent, received = time.monotonic() + seconds, 0, 0
while sent < most and time.monotonic() < end:
    for _ in range(10):
        os.kill(pid, signal.SIGRTMIN + 1)
        os.kill(pid, signal.SIGUSR1)
    sent += 10
    while sent - received > 100 and select.select([0], [], [], 1)[0]:
        received += len(os.read(0, 4096))
print(sent)
"""
LOOP = """
import asyncio, os, signal, sys, threading, time
import closewait_guard as cwg

sender, who, when, *limits = sys.argv[1:]
counted = signal.SIGRTMIN + 1
received = 0

def watch():
    cwg.install(signal="SIGUSR1")
    cwg.watch(interval=3600, at_exit=False)

async def main():
    sending = await asyncio.create_subprocess_exec(
        sys.executable, "-c", sender, str(os.getpid()), *limits, stdin=-1, stdout=-1
    )

    def receive():
        global received
        received += 1
        sending.stdin.write(b".")

    asyncio.get_running_loop().add_signal_handler(counted, receive)
    turns = 0
    while sending.returncode is None:
        turns += 1
        if who == "guard" and when == "later":
            watch()
            await asyncio.sleep(0.02)
            cwg.uninstall()
        await asyncio.sleep(0.02)
    sent = int(await sending.stdout.read())
    print(sent, sent - received)

signal.signal(signal.SIGUSR1, lambda *_: None)
if who == "guard" and when == "before":
    watch()
asyncio.run(main())
"""


def check_none_is_lost(who, when, seconds, most):
    done = run(LOOP, SENDER, who, when, seconds, most, timeout=seconds + 60)
    assert done.returncode == 0, done.stderr
    sent, lost = map(int, done.stdout.split())
    assert sent >= min(most, 1000)
    assert lost == 0, f"{lost} of {sent}"


@pytest.mark.parametrize(
    ("who", "when"), [("guard", "before"), ("guard", "later"), ("nobody", "before")]
)
def test_an_event_loop_loses_no_signal_while_reports_are_asked_for(who, when):
    check_none_is_lost(who, when, 10, 4000)


@pytest.mark.long
@pytest.mark.parametrize("when", ["before", "later"])
def test_an_event_loop_loses_no_signal_for_long(when, attack_seconds):
    check_none_is_lost("guard", when, attack_seconds, 1_000_000)


# Standard error is a pipe that is full and that is never read.
BLOCKED = """
import os, signal, sys, threading, time
import closewait_guard as cwg

reading, writing = os.pipe()
os.set_blocking(writing, False)
try:
    while True:
        os.write(writing, b"x" * 65536)
except BlockingIOError:
    os.set_blocking(writing, True)
os.dup2(writing, 2)

called = []
signal.signal(signal.SIGUSR1, lambda *_: called.append(1))
cwg.install(signal="SIGUSR1")
monitor = cwg.watch(interval=3600, at_exit=False) if sys.argv[1] == "monitor" else None
before = len(os.listdir("/proc/self/task"))
for _ in range(50):
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.002)
time.sleep(0.1)
threads = len(os.listdir("/proc/self/task")) - before
begun = time.monotonic()
if monitor is not None:
    monitor.stop()
cwg.uninstall()
print(len(called), threads, time.monotonic() - begun)
print({thread.name for thread in threading.enumerate() if "closewait" in thread.name})
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("who", ["monitor", "nobody"])
def test_a_report_that_blocks_holds_up_neither_the_end_nor_more_than_one_thread(who):
    done = run(BLOCKED, who)
    assert done.returncode == 0
    counts, left = done.stdout.splitlines()
    called, threads, seconds = map(float, counts.split())
    assert called == 50
    assert threads == 1
    assert seconds < 1
    assert left == "set()"


EXHAUSTED = """
import _thread, os, signal, threading
import closewait_guard as cwg

def refused(*_):
    raise RuntimeError("can't start new thread")

called = []
signal.signal(signal.SIGUSR1, lambda *_: called.append(1))
cwg.install(signal="SIGUSR1")
start, _thread.start_new_thread = _thread.start_new_thread, refused
for _ in range(3):
    os.kill(os.getpid(), signal.SIGUSR1)
_thread.start_new_thread = start
assert len(called) == 3
# What was asked for then is reported with the next.
os.kill(os.getpid(), signal.SIGUSR1)
assert len(called) == 4
"""


def test_without_a_thread_to_be_had_the_handler_that_was_there_is_called():
    done = run(EXHAUSTED)
    assert done.returncode == 0, done.stderr
    assert "can't start" not in done.stderr


RAISING = """
import os, signal, sys, time
import closewait_guard as cwg

called = 0

def count(*_):
    global called
    called += 1

class Interrupted(Exception):
    pass

def interrupt(*_):
    raise Interrupted

signal.signal(signal.SIGUSR1, count)
signal.signal(signal.SIGALRM, interrupt)
cwg.install(signal="SIGUSR1")
if sys.argv[1] == "monitor":
    cwg.watch(interval=3600, at_exit=False)
sent = 0
end = time.monotonic() + 1

def send():
    global sent
    while time.monotonic() < end:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.00002)
            sent += 1
            signal.raise_signal(signal.SIGUSR1)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            pass

while signal.getsignal(signal.SIGALRM) is interrupt:
    # It may also raise between two rounds, where nothing catches it.
    try:
        send()
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
    except Interrupted:
        pass
print(sent, called)
os.close(2)
os.open(os.devnull, os.O_WRONLY)
reports = []
cwg.install().scan = lambda: reports.append(1)
os.kill(os.getpid(), signal.SIGUSR1)
end = time.monotonic() + 30
while not reports and time.monotonic() < end:
    time.sleep(0.01)
print(len(reports) > 0)
"""


@pytest.mark.parametrize("who", ["monitor", "nobody"])
def test_another_handler_that_raises_in_the_middle_of_ours_ends_no_reports(who):
    done = run(RAISING, who)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "True"


@pytest.fixture
def theirs():
    """The program's own pipe for the numbers of signals, and a handler that does nothing."""
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    yield reading, writing
    cwg.uninstall()
    assert signal.set_wakeup_fd(-1) == -1
    os.close(reading)
    os.close(writing)
    signal.signal(signal.SIGUSR2, before)


def caught_at_each_look(monkeypatch):
    """A signal comes at each moment at which the descriptor is set to find out what was set."""
    set_it, count = _signal._set_wakeup_fd, []

    def look(fd):
        present = set_it(fd)
        if present not in (-1, fd):
            count.append(1)
            signal.raise_signal(signal.SIGUSR2)
        return present

    monkeypatch.setattr(_signal, "_set_wakeup_fd", look)
    return count


def test_what_comes_while_a_start_looks_who_has_the_descriptor_is_handed_on(theirs, monkeypatch):
    reading, writing = theirs
    signal.set_wakeup_fd(writing)
    count = caught_at_each_look(monkeypatch)
    with cwg.watch(interval=3600, at_exit=False, signal="SIGUSR1"):
        assert signal.set_wakeup_fd(writing) == writing
    assert count
    assert os.read(reading, 100) == bytes([signal.SIGUSR2]) * len(count)
    signal.set_wakeup_fd(-1)


def test_what_comes_while_an_end_looks_who_has_the_descriptor_is_handed_on(theirs, monkeypatch):
    reading, writing = theirs
    with cwg.watch(interval=3600, at_exit=False, signal="SIGUSR1"):
        assert signal.set_wakeup_fd(writing) != -1
        count = caught_at_each_look(monkeypatch)
    assert signal.set_wakeup_fd(-1) == writing
    assert count
    assert os.read(reading, 100) == bytes([signal.SIGUSR2]) * len(count)


def test_who_gives_the_descriptor_back_after_the_end_gives_back_one_that_is_open(theirs):
    _, writing = theirs
    with cwg.watch(interval=3600, at_exit=False, signal="SIGUSR1"):
        # As trio and uvloop do.
        ours = signal.set_wakeup_fd(writing)
        assert ours != -1
    assert signal.set_wakeup_fd(ours) == writing
    signal.raise_signal(signal.SIGUSR2)
    with cwg.watch(interval=3600, at_exit=False) as monitor:
        assert monitor._signal_reader.running
    assert signal.set_wakeup_fd(-1) == -1


def test_a_descriptor_that_its_owner_has_closed_hinders_no_start(theirs):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    os.close(reading)
    os.close(writing)
    with cwg.watch(interval=3600, at_exit=False, signal="SIGUSR1") as monitor:
        assert monitor.running
