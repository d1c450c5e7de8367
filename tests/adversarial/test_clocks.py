"""A test may stop the clock, or make it jump: what waits goes on, and ages stay true."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import socket
import threading
import time
from unittest import mock

import pytest

import closewait_guard as cwg
from closewait_guard import reporters
from closewait_guard.testing import CapturingReporter

freezegun = pytest.importorskip("freezegun")
time_machine = pytest.importorskip("time_machine")
trio = pytest.importorskip("trio")
trio_testing = pytest.importorskip("trio.testing")

LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
FAR_AHEAD = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)


@contextlib.contextmanager
def mocked():
    """Everything that a test might put a mock in the place of."""
    with (
        mock.patch("time.monotonic", return_value=5.0),
        mock.patch("time.perf_counter", return_value=5.0),
        mock.patch("time.time", return_value=5.0),
        mock.patch("time.sleep"),
    ):
        yield


@contextlib.contextmanager
def backwards():
    """Each look at the clock is an hour before the last one."""
    shown = iter(range(0, -1_000_000_000, -3600))
    with (
        mock.patch("time.monotonic", side_effect=shown.__next__),
        mock.patch("time.time", side_effect=shown.__next__),
    ):
        yield


STRANGE_CLOCKS = {
    "freezegun": lambda: freezegun.freeze_time(LONG_AGO, real_asyncio=False),
    "freezegun-ticking": lambda: freezegun.freeze_time(LONG_AGO, auto_tick_seconds=3600),
    "time-machine": lambda: time_machine.travel(LONG_AGO, tick=False),
    "time-machine-ahead": lambda: time_machine.travel(FAR_AHEAD, tick=True),
    "mocked": mocked,
    "backwards": backwards,
}


@pytest.fixture(params=STRANGE_CLOCKS)
def strange_clock(request):
    return STRANGE_CLOCKS[request.param]


@pytest.fixture(params=["freezegun", "time-machine", "mocked"])
def stopped_clock(request):
    return STRANGE_CLOCKS[request.param]


def closed_later(sock):
    """After the block, and before its grace time is over."""
    closing = threading.Timer(0.1, sock.close)
    closing.start()
    return closing


@pytest.mark.timeout(20)
def test_a_block_ends_with_its_grace_time_whatever_the_clock_shows(strange_clock, guard):
    with contextlib.ExitStack() as stack:
        began = time.perf_counter()
        with strange_clock(), pytest.raises(cwg.SocketLeakError), guard.no_leaks(grace=0.2):
            stack.enter_context(socket.socket())
        assert 0.2 <= time.perf_counter() - began < 5


@pytest.mark.timeout(20)
def test_a_socket_is_given_its_grace_time_whatever_the_clock_shows(strange_clock, guard):
    with strange_clock(), guard.no_leaks(grace=5):
        closing = closed_later(socket.socket())
    closing.join()


@pytest.mark.timeout(20)
def test_an_asynchronous_block_ends_though_the_clock_of_its_loop_stands_still(stopped_clock, guard):
    async def leak():
        # The loop itself was made before: it needs a clock to begin with.
        with stopped_clock():
            async with guard.no_leaks(grace=0.1):
                kept.append(socket.socket())

    kept = []
    with pytest.raises(cwg.SocketLeakError):
        asyncio.run(leak())
    kept.pop().close()


@pytest.mark.timeout(20)
def test_tasks_go_on_while_an_asynchronous_block_waits_beside_a_stopped_clock(stopped_clock, guard):
    async def close(sock):
        for _ in range(20):
            await asyncio.sleep(0)
        sock.close()

    async def program():
        with stopped_clock():
            async with guard.no_leaks(grace=5):
                closing = asyncio.create_task(close(socket.socket()))
        await closing

    asyncio.run(program())


@pytest.mark.timeout(20)
def test_an_asynchronous_block_of_trio_ends_though_its_clock_stands_still(guard):
    async def leak():
        async with guard.no_leaks(grace=0.1):
            kept.append(socket.socket())

    kept = []
    with pytest.raises(cwg.SocketLeakError):
        trio.run(leak, clock=trio_testing.MockClock())
    kept.pop().close()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("clock", ["freezegun.freeze_time(AT)", "time_machine.travel(AT, tick=0)"])
def test_pytest_ends_when_a_leaking_test_has_stopped_the_clock(suite, clock):
    result = suite.fail(
        f"""
import datetime, freezegun, time_machine
AT = datetime.datetime(2020, 1, 1)

@pytest.fixture(autouse=True, scope="session")
def stopped():
    with {clock}:
        yield

def test_it(): keep(socket.socket())
""",
        "--socket-leaks-grace=0.1",
    )
    result.assert_outcomes(passed=1, errors=1)


@pytest.mark.timeout(100)
def test_a_monitor_reports_on_whatever_the_clock_shows(strange_clock):
    reported = threading.Semaphore(0)
    with cwg.Guard(reporters=[lambda report: reported.release()]) as guard, strange_clock():
        with cwg.Monitor(guard, interval=0.05):
            assert all(reported.acquire(timeout=30) for _ in range(3))


def test_a_reporter_of_once_in_a_while_gets_its_reports_whatever_the_clock_shows(
    strange_clock,
):
    seen = CapturingReporter()
    with strange_clock(), cwg.Guard(reporters=[reporters.every(0.1, seen)]) as guard:
        for _ in range(3):
            guard.report()
            threading.Event().wait(0.11)
    assert len(seen.reports) == 3


def age_of_forgotten(guard, wait):
    """For how long a socket is said to have been of no use whose peer has closed `wait` ago."""
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        guard.scan()
        threading.Event().wait(wait)
        [leak] = guard.scan().findings
        return leak.observation.ended_for


def test_ages_are_those_that_have_really_passed(strange_clock, guard):
    with strange_clock():
        assert 0.2 <= age_of_forgotten(guard, 0.2) < 5


def test_a_socket_of_a_stopped_clock_is_no_older_than_it_is_when_the_clock_goes_on(guard):
    with freezegun.freeze_time(LONG_AGO):
        ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert all(leak.observation.ended_for < 5 for leak in guard.scan().findings)


def test_a_block_takes_nothing_of_what_a_test_lets_its_mocked_clock_answer():
    with mock.patch("time.time", side_effect=[1.0]) as asked:
        with cwg.no_leaks(grace=0):
            socket.socket().close()
        with pytest.raises(cwg.SocketLeakError), cwg.no_leaks(grace=0):
            left_open = socket.socket()
    assert not asked.called
    left_open.close()
