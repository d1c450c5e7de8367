"""A monitor reports at its interval, costs little, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest

import closewait_guard as cwg
from closewait_guard._monitor import Monitor, Pace
from closewait_guard.testing import CapturingReporter, half_closed_pair


def until(condition, seconds=30.0):
    """Wait for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@pytest.fixture
def told():
    return CapturingReporter()


@pytest.fixture
def watching(told):
    """A guard with a grace time of nought, and a quick monitor."""
    guard = cwg.Guard(cwg.Settings(grace=0), [told])
    with guard, Monitor(guard, interval=0.05, at_exit=False) as monitor:
        yield monitor


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60
    )


def test_it_tells_at_every_interval_what_there_is_at_that_time(watching, told):
    until(lambda: told.reports)
    assert not told.reports[0].leaks
    with half_closed_pair():
        until(lambda: told.reports[-1].leaks)
    until(lambda: not told.reports[-1].leaks)
    assert [len(report.closed_late) for report in told.reports if report.closed_late] == [1]


def test_the_first_report_comes_after_one_interval(told):
    begun = time.time()
    with cwg.Guard(reporters=[told]) as guard, Monitor(guard, interval=0.3, at_exit=False):
        until(lambda: told.reports)
    assert told.reports[0].taken_at - begun >= 0.29


def test_stopping_is_prompt_and_leaves_no_thread(told):
    with cwg.Guard(reporters=[told]) as guard:
        monitor = Monitor(guard, interval=3600).start()
        assert monitor.running
        begun = time.monotonic()
        monitor.stop()
        assert time.monotonic() - begun < 10
        assert not monitor.running
        monitor.stop()
    assert told.reports == []


def test_starting_twice_makes_one_thread(watching):
    before = threading.active_count()
    watching.start()
    assert threading.active_count() == before


def test_it_can_be_started_again(watching, told):
    watching.stop()
    watching.start()
    count = len(told.reports)
    until(lambda: len(told.reports) > count)


def test_a_block_ends_with_a_last_report(told):
    with cwg.Guard(cwg.Settings(grace=0), [told]) as guard:
        with half_closed_pair():
            with Monitor(guard, interval=3600):
                pass
    assert [len(report.leaks) for report in told.reports] == [1]


def test_uninstalling_stops_it():
    monitor = cwg.watch(interval=3600)
    cwg.uninstall()
    assert not monitor.running


def test_a_guard_of_ones_own_stops_its_monitor():
    with cwg.Guard() as guard:
        monitor = Monitor(guard, interval=3600).start()
    assert not monitor.running


def test_watching_installs_and_tells_beside_the_reporters_of_install(told):
    first = CapturingReporter()
    guard = cwg.install(reporters=[first])
    try:
        with cwg.watch(interval=0.05, reporters=[told], at_exit=False) as monitor:
            assert monitor.guard is guard
            until(lambda: told.reports and first.reports)
    finally:
        cwg.uninstall()


def test_a_second_monitor_of_the_process_is_refused():
    try:
        with cwg.watch(interval=3600, at_exit=False):
            with pytest.raises(cwg.ConfigurationError, match=r"a monitor is running already"):
                cwg.watch(interval=3600)
        cwg.watch(interval=3600).stop()
    finally:
        cwg.uninstall()


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf"), "60", True])
def test_an_interval_that_cannot_be_kept_is_refused_in_one_sentence(interval):
    with cwg.Guard() as guard:
        with pytest.raises(
            cwg.ConfigurationError, match=r"^interval must be a number of seconds above zero, not"
        ):
            Monitor(guard, interval)


def test_the_interval_is_that_of_the_settings_when_none_is_given(told):
    settings = cwg.Settings(interval=0.05)
    with cwg.Guard(settings, [told]) as guard, Monitor(guard, at_exit=False):
        until(lambda: told.reports)


def test_a_reporter_that_raises_does_not_end_the_series(told):
    def broken(report):
        raise SystemExit(3)

    with cwg.Guard(reporters=[broken, told]) as guard, Monitor(guard, 0.05, at_exit=False):
        until(lambda: len(told.reports) >= 3)
        assert guard.failed_reports >= 3


def test_a_look_that_fails_is_told_and_the_next_is_made(told, monkeypatch):
    with cwg.Guard(reporters=[told]) as guard:
        scan, failures = guard._pipeline._scan, []

        def sometimes(**options):
            if not failures:
                failures.append(1)
                raise RuntimeError("out of luck")
            return scan(**options)

        monkeypatch.setattr(guard._pipeline, "_scan", sometimes)
        with Monitor(guard, 0.05, at_exit=False):
            until(lambda: told.reports)
        assert failures


def test_an_interval_too_short_for_the_cost_is_stretched_and_the_reports_say_so(told, monkeypatch):
    with cwg.Guard(reporters=[told]) as guard:
        scan = guard._pipeline._scan

        def dear(**options):
            end = time.thread_time() + 0.005
            while time.thread_time() < end:
                pass
            return scan(**options)

        monkeypatch.setattr(guard._pipeline, "_scan", dear)
        with Monitor(guard, 0.01, at_exit=False):
            until(lambda: len(told.reports) >= 2)
    apart = told.reports[1].taken_at - told.reports[0].taken_at
    assert apart >= 0.45
    assert "too much for every 0 s" in told.reports[1].coverage.notes[-1]
    assert "too much" not in "".join(told.reports[0].coverage.notes)


def test_a_pace_that_costs_little_is_kept():
    assert Pace(60.0, 0.3).seconds == 60.0
    assert Pace(60.0, 0.3).note is None
    assert Pace(60.0, 0.6).seconds == pytest.approx(100.0)


def test_a_clock_that_jumps_changes_nothing(watching, told, monkeypatch):
    until(lambda: told.reports)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    count = len(told.reports)
    until(lambda: len(told.reports) > count + 2)


def test_a_reporter_that_blocks_does_not_block_the_program(told):
    released = threading.Event()

    def stuck(report):
        released.wait(10)

    settings = cwg.Settings(reporter_timeout=0.1)
    try:
        with cwg.Guard(settings, [stuck, told]) as guard, Monitor(guard, 0.05, at_exit=False):
            until(lambda: len(told.reports) >= 3)
    finally:
        released.set()
        until(lambda: "closewait-guard-reporter" not in {t.name for t in threading.enumerate()})


def test_an_event_loop_can_report_without_being_blocked(told):
    gaps = []

    async def main():
        reports = asyncio.create_task(
            cwg.watch_async(interval=0.05, reporters=[told, slow], grace=0, at_exit=False)
        )
        while len(told.reports) < 3:
            begun = time.monotonic()
            await asyncio.sleep(0.005)
            gaps.append(time.monotonic() - begun)
        reports.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reports

    def slow(report):
        time.sleep(2)

    try:
        asyncio.run(main())
    finally:
        cwg.uninstall()
    assert max(gaps) < 1.7


def test_an_event_loop_reports_once_more_when_it_is_cancelled(told):
    async def main():
        reports = asyncio.create_task(cwg.watch_async(interval=3600, reporters=[told]))
        await asyncio.sleep(0.05)
        reports.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reports

    try:
        asyncio.run(main())
    finally:
        cwg.uninstall()
    assert len(told.reports) == 1


LEAKS_AND_ENDS = """
import sys
import closewait_guard as cwg
from closewait_guard.testing import half_closed_pair
pair = half_closed_pair()
monitor = cwg.watch(interval=3600, reporters=["text"], grace=0, at_exit=sys.argv[1] == "yes")
pair.__enter__()
"""


def test_the_program_ends_with_a_last_report_if_it_is_wanted():
    done = run(LEAKS_AND_ENDS, "yes")
    assert done.returncode == 0
    assert "1 leaked" in done.stderr
    assert run(LEAKS_AND_ENDS, "no").stderr.count("leaked") == 0


BLOCKS_AT_EXIT = """
import time
import closewait_guard as cwg
cwg.watch(interval=3600, reporters=[lambda report: time.sleep(30)], reporter_timeout=0.2)
"""


def test_a_reporter_that_blocks_does_not_keep_the_program_from_ending():
    begun = time.monotonic()
    assert run(BLOCKS_AT_EXIT).returncode == 0
    assert time.monotonic() - begun < 25


FORKS = """
import os, sys, time
import closewait_guard as cwg
told = []
wanted = sys.argv[1] == "yes"
monitor = cwg.watch(interval=0.05, reporters=[told.append], at_exit=False, in_children=wanted)

def wait_for_reports():
    deadline = time.monotonic() + 20
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)

wait_for_reports()
child = os.fork()
told.clear()
if child == 0 and not wanted:
    time.sleep(0.5)
else:
    wait_for_reports()
if child == 0:
    pids = {report.pid for report in told}
    os._exit(monitor.running * 10 + (pids == {os.getpid()}))
_, status = os.waitpid(child, 0)
assert told and monitor.running
monitor.stop()
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(("wanted", "found"), [("yes", "11"), ("no", "0")])
def test_it_goes_on_in_a_forked_child_only_when_asked_to(wanted, found):
    done = run(FORKS, wanted)
    assert done.stdout.strip() == found, done.stderr


GREEN = """
import sys
if sys.argv[1] == "gevent":
    from gevent import monkey
    monkey.patch_all()
else:
    import eventlet
    eventlet.monkey_patch()
import threading, time
import closewait_guard as cwg
told, gaps = [], []
with cwg.watch(interval=3, reporters=[told.append], at_exit=False):
    while not told:
        begun = time.monotonic()
        time.sleep(0.01)
        gaps.append(time.monotonic() - begun)
cwg.uninstall()
assert threading.active_count() == 1, threading.enumerate()
print(max(gaps))
"""


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_green_threads_go_on_while_it_waits(library):
    pytest.importorskip(library)
    done = run(GREEN, library)
    assert done.returncode == 0, done.stderr
    # Far below the interval: nobody has waited for the monitor.
    assert float(done.stdout) < 2


def test_no_descriptor_is_left():
    before = set(os.listdir("/proc/self/fd"))
    with cwg.watch(interval=0.05, signal="USR2", at_exit=False):
        time.sleep(0.1)
    cwg.uninstall()
    assert set(os.listdir("/proc/self/fd")) == before


def test_sockets_are_not_kept_alive_by_the_series(watching, told):
    with half_closed_pair():
        until(lambda: told.reports and told.reports[-1].leaks)
    until(lambda: told.reports[-1].open_sockets == 0)
