"""A forked child has no thread but its own, and waits for none of its parent's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")

# The reporter blocks in the parent while it forks; what the child calls must take no time.
PROGRAM = """
import os, signal, sys, threading, time
import closewait_guard as cwg

parent, is_blocking = os.getpid(), threading.Event()

class Reporter:
    def __call__(self, report):
        if os.getpid() == parent:
            is_blocking.set()
            time.sleep(60)

    def close(self):
        pass

case = sys.argv[1]
options = {"reporters": [Reporter()], "reporter_timeout": 10.0}
monitor = None
if case == "plain":
    guard = cwg.Guard(cwg.Settings(reporter_timeout=10.0), options["reporters"])
elif case == "installed":
    guard = cwg.install(**options)
else:
    monitor = cwg.watch(interval=0.05, in_children=case == "children", **options)
    guard = monitor.guard
if monitor is None:
    threading.Thread(target=guard.report, daemon=True).start()
assert is_blocking.wait(60)
if case == "uninstalled":
    guard.uninstall()

child = os.fork()
if child == 0:
    begun = time.monotonic()
    guard.report()
    if monitor is not None:
        monitor.stop()
        monitor.__exit__()
    guard.uninstall()
    cwg.uninstall()
    os._exit(time.monotonic() - begun > 1.5)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("case", ["plain", "installed", "watched", "children", "uninstalled"])
def test_no_call_in_a_child_waits_for_a_reporter_of_the_parent(case):
    done = subprocess.run([sys.executable, "-c", PROGRAM, case], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


BY_SIGNAL = """
import os, signal, sys, threading, time
import closewait_guard as cwg

cwg.install(signal="SIGUSR1")
guard, parent = cwg.install(), os.getpid()
is_blocking, reported = threading.Event(), []

def report():
    if os.getpid() != parent:
        reported.append(1)
        return
    is_blocking.set()
    time.sleep(60)

guard.scan = report
if sys.argv[1] != "nobody":
    monitor = cwg.watch(interval=3600, at_exit=False, in_children=sys.argv[1] == "children")
os.kill(os.getpid(), signal.SIGUSR1)
assert is_blocking.wait(60)

child = os.fork()
if child == 0:
    begun = time.monotonic()
    os.kill(os.getpid(), signal.SIGUSR1)
    while not reported and time.monotonic() - begun < 10:
        time.sleep(0.01)
    time.sleep(0.1)
    cwg.uninstall()
    is_slow = time.monotonic() - begun > 1.5
    os._exit(is_slow or len(reported) != 1 or signal.set_wakeup_fd(-1) != -1)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("who", ["monitor", "children", "nobody"])
def test_a_child_reports_by_signal_while_a_report_of_the_parent_blocks(who):
    done = subprocess.run([sys.executable, "-c", BY_SIGNAL, who], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
