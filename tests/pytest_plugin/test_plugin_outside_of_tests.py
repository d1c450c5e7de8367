"""What other plugins, conftest files and imports open outside of tests is the leak of no test."""

from __future__ import annotations

import pytest

OPENING = """
import gc, socket, threading
import pytest

OPENED = {{}}

def open_one(place):
    ours, theirs = socket.socketpair()
    theirs.close()
    kept = OPENED[place] = [ours]
    {cycle}

gc.disable()
open_one("import")

def pytest_configure(): open_one("configure")

def pytest_sessionstart(): open_one("session start")

def pytest_collection_modifyitems(): open_one("collection")

@pytest.hookimpl(wrapper=True)
def pytest_runtestloop():
    open_one("loop")
    return (yield)

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    open_one("before " + item.name)
    return (yield)

def pytest_runtest_logstart(): open_one("log start")

def pytest_runtest_makereport(call): open_one("report of " + call.when)

def pytest_runtest_logreport(report): open_one("log of " + report.when)

def pytest_runtest_logfinish(): open_one("log finish")
"""
INNOCENT = """
import opening

opening.open_one("collected")

def test_first():
    assert "collected" in opening.OPENED
    {within}

def test_last():
    assert "report of teardown" in opening.OPENED
    {within}
"""
MARKS = "pytestmark = [pytest.mark.filterwarnings('error'), pytest.mark.socket_leaks('warn')]\n"


def test_what_was_opened_outside_of_tests_and_goes_away_within_one_fails_no_test(suite):
    suite.pytester.makepyfile(opening=OPENING.format(cycle=""))
    source = INNOCENT.format(within="opening.OPENED.clear()")
    result = suite.fail(source, "-p", "opening", apart=True)
    result.assert_outcomes(passed=2)
    result.stdout.no_fnmatch_line("*socket leaks*")


def test_what_it_raises_when_a_check_collects_it_is_a_warning_of_no_test(suite):
    suite.pytester.makepyfile(opening=OPENING.format(cycle="kept.append(kept)"))
    # What stays open makes the check collect garbage.
    leave_one = "opening.OPENED.clear(), keep(socket.socket())"
    source = MARKS + INNOCENT.format(within=leave_one)
    result = suite.fail(source, "-p", "opening", apart=True)
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] == 2
    assert not {"failed", "errors"} & outcomes.keys(), result.stdout.str()
    # Of those that are older than the run, the line is not known.
    lines = result.stdout.str()
    assert lines.count("<unknown>:0: PytestUnraisableExceptionWarning: ResourceWarning") == 2
    assert "opening.py:7: PytestUnraisableExceptionWarning: ResourceWarning: unclosed" in lines
    assert "(opened outside of the tests; found by the socket check of " in lines


THREAD = """
import queue, socket, threading
import pytest

CALLS, DONE, KEPT = queue.Queue(), threading.Semaphore(0), []

def work():
    for call in iter(CALLS.get, None):
        call()
        DONE.release()

def call_in_thread(call):
    CALLS.put(call)
    assert DONE.acquire(timeout=60)

THREAD = threading.Thread(target=work)
THREAD.start()

def pytest_unconfigure():
    CALLS.put(None)
    THREAD.join()
"""
CALLING = """
import opening

{marker}
def test_it():
    opening.call_in_thread(lambda: opening.KEPT.append(socket.socket()))
    opening.call_in_thread(opening.KEPT.clear)
"""


@pytest.mark.parametrize(
    ("mode", "marker"), [("fail", ""), ("off", "@pytest.mark.socket_leaks('fail')")]
)
def test_a_thread_that_ran_before_the_tests_belongs_to_none(suite, mode, marker):
    suite.pytester.makepyfile(opening=THREAD)
    source = CALLING.format(marker=marker)
    result = suite.run(source, f"--socket-leaks={mode}", "-p", "opening", apart=True)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*socket leaks*")


def test_a_worker_that_an_executor_had_before_the_tests_serves_the_test_that_submits(suite):
    suite.pytester.makeconftest(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "EXECUTOR = ThreadPoolExecutor(1)\n"
        "EXECUTOR.submit(int).result()\n"
    )
    result = suite.fail(
        "from conftest import EXECUTOR\n"
        "def test_it(): EXECUTOR.submit(lambda: socket.socket() and None).result()\n",
        "-rE",
        apart=True,
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["ERROR test_it.py::test_it - line * leaked 1 socket*"])


BORROWING = """
import socket
import pytest

@pytest.fixture
def online():
    socket.socket()

def pytest_runtest_setup(item): item.fixturenames.append("online")
"""


def test_what_a_plugins_fixture_opens_for_one_test_is_that_tests(suite):
    suite.pytester.makepyfile(opening=BORROWING)
    result = suite.fail("def test_it(): pass\n", "-p", "opening", "-rE", apart=True)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["ERROR test_it.py::test_it - opening.py:6 *: leaked 1 socket*"])
