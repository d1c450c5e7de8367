"""Reporters are called in isolation: one that fails hurts neither the others nor the program."""

from __future__ import annotations

import contextvars
import os
import socket
import threading
import time

import pytest
import structlog

import closewait_guard as cwg
from closewait_guard.testing import CapturingReporter, half_closed_pair
from leaking import fork, run


def test_reporters_get_reports_and_no_scans():
    reporter = CapturingReporter()
    cwg.install(reporters=[reporter], grace=0)
    try:
        with half_closed_pair():
            cwg.scan()
            assert reporter.reports == []
            received = cwg.report()
    finally:
        cwg.uninstall()
    assert reporter.reports == [received]
    assert received.leaks


def test_a_reporter_that_raises_is_logged_once_and_the_others_still_run():
    def broken(report):
        raise RuntimeError("disk full")

    reporter = CapturingReporter()
    with cwg.Guard(reporters=[broken, reporter]) as guard:
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                guard.report()
    assert len(reporter.reports) == 3
    assert guard.failed_reports == 3
    [log] = logs
    assert log["event"] == "a reporter failed"
    assert "broken" in log["reporter"]
    assert log["error"] == "RuntimeError: disk full"


def test_a_broken_logger_does_not_reach_the_program(monkeypatch):
    def broken(*args):
        raise RuntimeError("no logging today")

    monkeypatch.setattr(structlog, "get_logger", broken)
    with cwg.Guard(reporters=[broken]) as guard:
        guard.report()
    assert guard.failed_reports == 1


def test_an_interrupt_in_a_reporter_passes_when_the_others_have_the_report():
    for passing in (KeyboardInterrupt, SystemExit):

        def interrupted(report, passing=passing):
            raise passing

        reporter = CapturingReporter()
        with cwg.Guard(reporters=[interrupted, reporter]) as guard, pytest.raises(passing):
            guard.report()
        assert len(reporter.reports) == 1


def test_in_another_thread_an_interrupt_is_a_failure_like_any_other():
    """Nothing in that thread waits for the interrupt, and the thread has more to do."""

    def leaves(report):
        raise SystemExit

    reporter = CapturingReporter()
    with cwg.Guard(reporters=[leaves, reporter]) as guard:
        with structlog.testing.capture_logs() as logs:
            thread = threading.Thread(target=guard.report)
            thread.start()
            thread.join(10)
    assert [log["event"] for log in logs] == ["a reporter failed"]
    assert (guard.failed_reports, len(reporter.reports)) == (1, 1)


def test_a_reporter_that_recovers_is_logged_again_when_it_fails_again():
    outcomes = iter([OSError("one"), OSError("one"), None, OSError("two")])

    def unreliable(report):
        if error := next(outcomes):
            raise error

    with cwg.Guard(reporters=[unreliable]) as guard:
        with structlog.testing.capture_logs() as logs:
            for _ in range(4):
                guard.report()
    assert [log["error"].partition(": ")[2] for log in logs] == ["one", "two"]
    assert guard.failed_reports == 3


FAILING = """
def no_route(report):
    raise OSError("no route to pager")

with cwg.Guard(reporters=[no_route]) as guard:
    guard.report()
    guard.report()
"""


@pytest.mark.parametrize("before", ["", "import structlog"])
def test_a_failure_is_one_line_on_stderr_where_structlog_is_not_configured(before):
    stdout, stderr = run(before + FAILING)
    assert stdout == ""
    assert stderr == (
        "closewait-guard: a reporter failed: "
        "reporter='no_route', error='OSError: no route to pager'\n"
    )


def test_a_failure_is_logged_with_its_traceback_by_the_program_s_own_structlog():
    stdout, stderr = run("import structlog; structlog.configure()" + FAILING)
    assert stderr == ""
    assert stdout.count("a reporter failed") == 1
    assert "Traceback" in stdout
    assert "in no_route" in stdout


class Blocking(CapturingReporter):
    """A reporter that returns only when it is released."""

    def __init__(self):
        super().__init__()
        self.may_go_on = threading.Event()

    def __call__(self, report):
        assert self.may_go_on.wait(20)
        super().__call__(report)


def until(true):
    for _ in range(500):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("not in five seconds")


def test_a_reporter_that_blocks_is_logged_and_skipped_and_gets_reports_again_when_it_is_free():
    blocking, other = Blocking(), CapturingReporter()
    settings = cwg.Settings(reporter_timeout=0.5)
    with cwg.Guard(settings, [blocking, other]) as guard:
        with structlog.testing.capture_logs() as logs:
            began = time.monotonic()
            first = guard.report()
            assert 0.5 <= time.monotonic() - began < 5
            began = time.monotonic()
            guard.report()
            guard.report()
            assert time.monotonic() - began < 0.5, "no report waits for it again"
        assert logs == [
            {
                "event": "a reporter blocks",
                "reporter": "Blocking",
                "seconds": 0.5,
                "log_level": "warning",
            }
        ]
        assert (guard.failed_reports, len(other.reports)) == (3, 3)
        blocking.may_go_on.set()
        until(lambda: blocking.reports)
        assert blocking.reports == [first]
        until(lambda: guard.report() in blocking.reports)
        blocking.may_go_on.clear()
        with structlog.testing.capture_logs() as logs:
            guard.report()
        assert [log["event"] for log in logs] == ["a reporter blocks"]
        blocking.may_go_on.set()
        until(lambda: len(blocking.reports) == 3)


def test_logging_a_blocked_reporter_cannot_block_the_guard():
    """The reporter may hold the very lock that a log line needs."""
    lock = threading.Lock()
    blocking = Blocking()

    def holds_the_lock(report):
        with lock:
            blocking(report)

    def needs_the_lock(logger, name, event):
        with lock:
            raise structlog.DropEvent

    structlog.configure(processors=[needs_the_lock])
    try:
        with cwg.Guard(cwg.Settings(reporter_timeout=0.1), [holds_the_lock]) as guard:
            began = time.monotonic()
            guard.report()
            assert time.monotonic() - began < 2
            blocking.may_go_on.set()
            until(lambda: not lock.locked())
    finally:
        structlog.reset_defaults()
    until(lambda: not any("reporter" in thread.name for thread in threading.enumerate()))


def test_reports_of_two_threads_at_once_both_reach_a_reporter_one_after_the_other():
    at_once = []

    class Slow(CapturingReporter):
        inside = 0

        def __call__(self, report):
            self.inside += 1
            at_once.append(self.inside)
            time.sleep(0.05)
            super().__call__(report)
            self.inside -= 1

    slow = Slow()
    with cwg.Guard(reporters=[slow]) as guard:
        threads = [threading.Thread(target=guard.report) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert guard.failed_reports == 0
    assert len(slow.reports) == 4
    assert at_once == [1, 1, 1, 1]


def test_a_reporter_that_calls_report_does_not_get_that_report_and_does_not_wait():
    received = []

    def curious(report):
        received.append(report)
        guard.report()

    with cwg.Guard(reporters=[curious]) as guard:
        began = time.monotonic()
        guard.report()
        assert time.monotonic() - began < 2
    assert len(received) == 1


def test_a_reporter_may_make_sockets_and_leak_them():
    leaks = []

    def careless(report):
        leaks.append(socket.create_connection(server.getsockname()))

    with socket.create_server(("127.0.0.1", 0)) as server:
        with cwg.Guard(cwg.Settings(grace=0), [careless]) as guard:
            guard.report()
            assert guard.failed_reports == 0
            server.accept()[0].close()
            time.sleep(0.05)
            sites = [leak.observation.record.site.function for leak in guard.report().leaks]
    assert sites == ["test_a_reporter_may_make_sockets_and_leak_them.<locals>.careless"]
    for sock in leaks:
        sock.close()


def test_reporters_get_reports_when_no_thread_can_be_started(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    def broken(report):
        raise OSError("disk full")

    reporter = CapturingReporter()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with cwg.Guard(reporters=[broken, reporter]) as guard:
        with structlog.testing.capture_logs() as logs:
            guard.report()
            guard.report()
    assert len(reporter.reports) == 2
    assert [log["error"] for log in logs] == ["OSError: disk full"]


def test_reporters_get_reports_while_the_interpreter_shuts_down():
    code = """
import atexit
guard = cwg.Guard(reporters=[lambda report: print("reported", flush=True)]).install()
class Late:
    def __init__(self):
        self.guard = guard
    def __del__(self, is_finalizing=sys.is_finalizing):
        assert is_finalizing()
        self.guard.report()
import builtins
builtins.late = Late()
atexit.register(guard.report)
"""
    assert run(code)[0] == "reported\nreported\n"


def test_a_child_forked_while_a_reporter_is_busy_gives_it_reports_too():
    blocking = Blocking()
    with cwg.Guard(cwg.Settings(reporter_timeout=0.05), [blocking]) as guard:
        with structlog.testing.capture_logs():
            guard.report()
        child = fork()
        if child == 0:
            blocking.may_go_on = threading.Event()
            blocking.may_go_on.set()
            guard.report()
            os._exit(0 if len(blocking.reports) == 1 else 1)
        assert os.waitpid(child, 0)[1] == 0
        blocking.may_go_on.set()
        until(lambda: blocking.reports)


def test_what_the_program_has_bound_is_bound_for_its_reporters():
    request = contextvars.ContextVar("request", default=None)
    seen = []
    with cwg.Guard(reporters=[lambda report: seen.append(request.get())]) as guard:
        token = request.set("r7")
        guard.report()
        request.reset(token)
    assert seen == ["r7"]


def test_a_reporter_that_cannot_be_closed_is_logged_and_the_others_are_closed():
    closed = []

    class Closing:
        def __init__(self, error=None):
            self.error = error

        def __call__(self, report):
            pass

        def close(self):
            closed.append(self)
            if self.error:
                raise self.error

    both = [Closing(OSError("still mounted")), Closing()]
    with structlog.testing.capture_logs() as logs:
        with cwg.Guard(reporters=both) as guard:
            pass
    assert closed == both
    assert [log["error"] for log in logs] == ["OSError: still mounted"]
    assert guard.failed_reports == 1
