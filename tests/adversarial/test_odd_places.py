"""Creations and scans in odd places neither recurse nor raise."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

import closewait_guard as cwg


class Odd:
    def __getattr__(self, name):
        # Those with underscores are what pytest asks of each module.
        raise (AttributeError if name.startswith("__") else RuntimeError)(name)


def test_a_context_provider_that_opens_sockets_is_not_asked_about_them():
    asked = []

    def opens():
        asked.append(1)
        socket.socket().close()
        return {"request": 1}

    with cwg.Guard(cwg.Settings(context=opens)) as guard, socket.socket():
        [seen] = guard.scan(full=True).observations
        assert guard.scan().coverage.opened == 2
    assert seen.record.context == {"request": 1}
    assert asked == [1]


@pytest.mark.parametrize("odd", [None, Odd()])
def test_odd_objects_in_place_of_the_module_ssl_stop_no_scan(odd, monkeypatch):
    monkeypatch.setitem(sys.modules, "ssl", odd)
    with cwg.Guard() as guard, socket.socket():
        report = guard.scan(full=True)
    assert len(report.observations) + len(report.findings) == 1
    assert report.coverage.failures == 0


def run(program):
    """What a program of its own prints: audit hooks stay for good."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stdout.split(), done.stderr


_UNDER_A_HOOK = """
import socket, sys
import closewait_guard as cwg

refused = None

def hook(event, args):
    if event == refused:
        raise RuntimeError(event)

sys.addaudithook(hook)
with cwg.Guard(cwg.Settings(grace=0)) as guard:
    ours, theirs = socket.socketpair()
    theirs.close()
    detached = socket.socket().detach()
    before = len(guard.scan().findings)
    refused = {event!r}
    report = guard.scan(full=True)
    refused = None
    said = [note for note in report.coverage.notes if "hook" in note or "failed" in note]
    print(len(report.findings) == before or bool(said), bool(said), guard.scan().coverage.failures)
    again = guard.scan().coverage.notes
    print([note for note in again if "hook" in note] == [note for note in said if "hook" in note])
"""


@pytest.mark.parametrize(
    "event",
    ["fcntl.ioctl", "os.listdir", "socket.__new__", "socket.gethostname", "sys._current_frames"],
)
def test_a_scan_survives_an_audit_hook_that_raises_counts_it_once_and_says_so(event):
    assert run(_UNDER_A_HOOK.replace("{event!r}", repr(event))) == (
        0,
        ["True", "True", "0", "True"],
        "",
    )


_COLLECTED_OFTEN = """
import gc, sys, threading, time
from closewait_guard._live import running_frames

def let_others_run(phase, info):
    time.sleep(0)

gc.callbacks.append(let_others_run)
gc.set_threshold(5)
sys.setswitchinterval(1e-5)
end = time.monotonic() + 2

def ask():
    while time.monotonic() < end:
        running_frames()
        [[] for _ in range(7)]

threads = [threading.Thread(target=ask) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(gc.isenabled())
gc.disable()
running_frames()
print(gc.isenabled())
"""


def test_threads_that_ask_where_all_are_never_wait_for_a_collection_and_leave_the_collector_alone():
    assert run(_COLLECTED_OFTEN) == (0, ["True", "False"], "")


_AT_THE_END = """
import atexit, socket, sys
import closewait_guard as cwg

class Late:
    def __init__(self):
        self.new, self.scan = socket.socket, guard.scan

    def __del__(self):
        self.new().close()
        self.new()
        self.scan()
        print("late", flush=True)

guard = cwg.install()
atexit.register(lambda: (socket.socket().close(), socket.socket(), guard.scan(), print("exit")))
kept = Late()
sys.modules["kept"] = kept
left = socket.socket()
"""


def test_creations_and_scans_at_the_end_of_the_interpreter_raise_nothing():
    code, printed, errors = run(_AT_THE_END)
    assert (code, printed, errors) == (0, ["exit", "late"], "")


@pytest.mark.parametrize("install", [sys.setprofile, sys.settrace])
def test_creations_and_scans_under_a_function_that_opens_sockets_do_not_recurse(install):
    seen = []

    def opens(frame, event, arg):
        if not seen:
            seen.append(event)
            socket.socket().close()

    before = {sys.setprofile: sys.getprofile, sys.settrace: sys.gettrace}[install]()
    with cwg.Guard() as guard:
        install(opens)
        try:
            sock = socket.socket()
            report = guard.scan()
        finally:
            install(before)
        sock.close()
    assert seen
    assert (report.coverage.opened, report.coverage.failures) == (2, 0)


@pytest.mark.parametrize("install", [sys.setprofile, sys.settrace])
def test_what_a_profile_or_trace_function_raises_reaches_the_program_and_leaves_no_descriptor(
    install,
):
    """As it does without us: so a debugger ends what it debugs."""

    def fails(frame, event, arg):
        if frame.f_code.co_filename.endswith("_capture/recorder.py"):
            raise RuntimeError(event)

    before = {sys.setprofile: sys.getprofile, sys.settrace: sys.gettrace}[install]()
    numbers = set(os.listdir("/dev/fd"))
    with cwg.Guard() as guard:
        install(fails)
        try:
            with pytest.warns(ResourceWarning), pytest.raises(RuntimeError, match="call"):
                make_and_forget()
        finally:
            install(before)
        assert len(set(os.listdir("/dev/fd")) - numbers) <= 1
        assert guard.scan().coverage.failures == 0


def make_and_forget():
    try:
        socket.socket()
    except RuntimeError as error:
        # Its frames have the socket.
        raise error.with_traceback(None) from None
