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
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def reporter():
    return CapturingReporter()


@pytest.fixture
def running_monitor(reporter):
    """A monitor with a short interval, of a guard without a grace time."""
    guard = cwg.Guard(cwg.Settings(grace=0), [reporter])
    with guard, Monitor(guard, interval=0.05, at_exit=False) as monitor:
        yield monitor


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60
    )


def test_every_interval_has_a_report_of_that_moment(running_monitor, reporter):
    until(lambda: reporter.reports)
    assert not reporter.reports[0].leaks
    with half_closed_pair():
        until(lambda: reporter.reports[-1].leaks)
    until(lambda: not reporter.reports[-1].leaks)
    assert [len(report.closed_late) for report in reporter.reports if report.closed_late] == [1]


def test_the_first_report_comes_after_one_interval(reporter):
    started = time.time()
    with cwg.Guard(reporters=[reporter]) as guard, Monitor(guard, interval=0.3, at_exit=False):
        until(lambda: reporter.reports)
    assert reporter.reports[0].taken_at - started >= 0.29


def test_stopping_is_prompt_and_leaves_no_thread(reporter):
    with cwg.Guard(reporters=[reporter]) as guard:
        monitor = Monitor(guard, interval=3600).start()
        assert monitor.running
        started = time.monotonic()
        monitor.stop()
        assert time.monotonic() - started < 10
        assert not monitor.running
        monitor.stop()
    assert reporter.reports == []


def test_starting_twice_makes_one_thread(running_monitor):
    before = threading.active_count()
    running_monitor.start()
    assert threading.active_count() == before


def test_it_can_be_started_again(running_monitor, reporter):
    running_monitor.stop()
    running_monitor.start()
    count = len(reporter.reports)
    until(lambda: len(reporter.reports) > count)


def test_a_block_ends_with_a_last_report(reporter):
    with cwg.Guard(cwg.Settings(grace=0), [reporter]) as guard:
        with half_closed_pair():
            with Monitor(guard, interval=3600):
                pass
    assert [len(report.leaks) for report in reporter.reports] == [1]


def test_uninstalling_stops_it():
    monitor = cwg.watch(interval=3600)
    cwg.uninstall()
    assert not monitor.running


def test_a_guard_of_ones_own_stops_its_monitor():
    with cwg.Guard() as guard:
        monitor = Monitor(guard, interval=3600).start()
    assert not monitor.running


def test_watching_adds_reporters_to_those_of_install(reporter):
    first = CapturingReporter()
    guard = cwg.install(reporters=[first])
    try:
        with cwg.watch(interval=0.05, reporters=[reporter], at_exit=False) as monitor:
            assert monitor.guard is guard
            until(lambda: reporter.reports and first.reports)
    finally:
        cwg.uninstall()


def test_watching_without_any_reporter_prints_text_to_stderr(capfd):
    cwg.install(grace=0)
    try:
        with half_closed_pair(), cwg.watch(interval=3600):
            time.sleep(0.05)
    finally:
        cwg.uninstall()
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert stderr.count("1 leaked socket from ") == 1
    assert "    fix " in stderr


def test_watching_prints_nothing_where_there_is_a_reporter(capfd, reporter):
    cwg.install(reporters=[reporter])
    try:
        with cwg.watch(interval=3600):
            pass
    finally:
        cwg.uninstall()
    assert capfd.readouterr() == ("", "")


def test_a_second_monitor_of_the_process_is_refused():
    try:
        with cwg.watch(interval=3600, at_exit=False):
            with pytest.raises(cwg.ConfigurationError, match=r"a monitor is running already"):
                cwg.watch(interval=3600)
        cwg.watch(interval=3600).stop()
    finally:
        cwg.uninstall()


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf"), "60", True])
def test_an_impossible_interval_is_refused_in_one_sentence(interval):
    with cwg.Guard() as guard:
        with pytest.raises(
            cwg.ConfigurationError, match=r"^interval: expected a positive number of seconds, got"
        ):
            Monitor(guard, interval)


def test_the_interval_is_that_of_the_settings_when_none_is_given(reporter):
    settings = cwg.Settings(interval=0.05)
    with cwg.Guard(settings, [reporter]) as guard, Monitor(guard, at_exit=False):
        until(lambda: reporter.reports)


def test_a_reporter_that_raises_does_not_end_the_series(reporter):
    def broken(report):
        raise SystemExit(3)

    with cwg.Guard(reporters=[broken, reporter]) as guard, Monitor(guard, 0.05, at_exit=False):
        until(lambda: len(reporter.reports) >= 3)
        assert guard.failed_reports >= 3


def test_a_scan_that_fails_does_not_end_the_series(reporter, monkeypatch):
    with cwg.Guard(reporters=[reporter]) as guard:
        scan, failures = guard._pipeline._scan, []

        def sometimes(**options):
            if not failures:
                failures.append(1)
                raise RuntimeError("out of luck")
            return scan(**options)

        monkeypatch.setattr(guard._pipeline, "_scan", sometimes)
        with Monitor(guard, 0.05, at_exit=False):
            until(lambda: reporter.reports)
        assert failures


def test_an_interval_too_short_for_the_cost_is_lengthened_and_the_reports_say_so(
    reporter, monkeypatch
):
    with cwg.Guard(reporters=[reporter]) as guard:
        scan = guard._pipeline._scan

        def costly(**options):
            end = time.thread_time() + 0.005
            while time.thread_time() < end:
                pass
            return scan(**options)

        monkeypatch.setattr(guard._pipeline, "_scan", costly)
        with Monitor(guard, 0.01, at_exit=False):
            until(lambda: len(reporter.reports) >= 2)
    apart = reporter.reports[1].taken_at - reporter.reports[0].taken_at
    assert apart >= 0.45
    assert "too long for an interval of 0.01 s" in reporter.reports[1].coverage.notes[-1]
    assert "too long" not in "".join(reporter.reports[0].coverage.notes)


def test_an_interval_of_cheap_scans_is_kept():
    assert Pace(60.0, 0.3).seconds == 60.0
    assert Pace(60.0, 0.3).note is None
    assert Pace(60.0, 0.6).seconds == pytest.approx(100.0)


def test_a_clock_that_jumps_changes_nothing(running_monitor, reporter, monkeypatch):
    until(lambda: reporter.reports)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    count = len(reporter.reports)
    until(lambda: len(reporter.reports) > count + 2)


def test_a_reporter_that_blocks_does_not_block_the_program(reporter):
    released = threading.Event()

    def stuck(report):
        released.wait(10)

    settings = cwg.Settings(reporter_timeout=0.1)
    try:
        with cwg.Guard(settings, [stuck, reporter]) as guard, Monitor(guard, 0.05, at_exit=False):
            until(lambda: len(reporter.reports) >= 3)
    finally:
        released.set()
        until(lambda: "closewait-guard-reporter" not in {t.name for t in threading.enumerate()})


def test_an_event_loop_can_report_without_being_blocked(reporter):
    gaps = []

    async def main():
        reports = asyncio.create_task(
            cwg.watch_async(interval=0.05, reporters=[reporter, slow], grace=0, at_exit=False)
        )
        while len(reporter.reports) < 3:
            started = time.monotonic()
            await asyncio.sleep(0.005)
            gaps.append(time.monotonic() - started)
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


def test_an_event_loop_reports_once_more_when_it_is_cancelled(reporter):
    async def main():
        reports = asyncio.create_task(cwg.watch_async(interval=3600, reporters=[reporter]))
        await asyncio.sleep(0.05)
        reports.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reports

    try:
        asyncio.run(main())
    finally:
        cwg.uninstall()
    assert len(reporter.reports) == 1


LEAKS_AND_ENDS = """
import sys
import closewait_guard as cwg
from closewait_guard.testing import half_closed_pair
pair = half_closed_pair()
monitor = cwg.watch(interval=3600, reporters=["text"], grace=0, at_exit=sys.argv[1] == "yes")
pair.__enter__()
"""


def test_the_program_ends_with_a_last_report_when_wanted():
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
    started = time.monotonic()
    assert run(BLOCKS_AT_EXIT).returncode == 0
    assert time.monotonic() - started < 25


FORKS = """
import os, sys, time
import closewait_guard as cwg
reports = []
wanted = sys.argv[1] == "yes"
monitor = cwg.watch(interval=0.05, reporters=[reports.append], at_exit=False, in_children=wanted)

def wait_for_reports():
    deadline = time.monotonic() + 20
    while not reports and time.monotonic() < deadline:
        time.sleep(0.01)

wait_for_reports()
child = os.fork()
reports.clear()
if child == 0 and not wanted:
    time.sleep(0.5)
else:
    wait_for_reports()
if child == 0:
    pids = {report.pid for report in reports}
    os._exit(monitor.running * 10 + (pids == {os.getpid()}))
_, status = os.waitpid(child, 0)
assert reports and monitor.running
monitor.stop()
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(("wanted", "found"), [("yes", "11"), ("no", "0")])
def test_it_continues_in_a_forked_child_only_on_request(wanted, found):
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
reports, gaps = [], []
with cwg.watch(interval=3, reporters=[reports.append], at_exit=False):
    while not reports:
        started = time.monotonic()
        time.sleep(0.01)
        gaps.append(time.monotonic() - started)
cwg.uninstall()
assert threading.active_count() == 1, threading.enumerate()
print(max(gaps))
"""


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_green_threads_run_while_it_waits(library):
    pytest.importorskip(library)
    done = run(GREEN, library)
    assert done.returncode == 0, done.stderr
    # Far below the interval: no thread has waited for the monitor.
    assert float(done.stdout) < 2


def test_no_descriptor_is_left():
    before = set(os.listdir("/proc/self/fd"))
    with cwg.watch(interval=0.05, signal="USR2", at_exit=False):
        time.sleep(0.1)
    cwg.uninstall()
    # The reader of an earlier test may end meanwhile.
    assert set(os.listdir("/proc/self/fd")) <= before


def test_sockets_are_not_kept_alive_by_the_series(running_monitor, reporter):
    with half_closed_pair():
        until(lambda: reporter.reports and reporter.reports[-1].leaks)
    until(lambda: reporter.reports[-1].open_sockets == 0)
