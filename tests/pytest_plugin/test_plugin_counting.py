"""Which sockets are leaks of a test, and which are not."""

from __future__ import annotations

import gc
import sys

import pytest


@pytest.fixture
def no_automatic_collection():
    """What it collects during a scan that holds the socket is reported as left by a variable."""
    was_enabled = gc.isenabled()
    gc.disable()
    yield
    if was_enabled:
        gc.enable()


def errors_of(result):
    return result.parseoutcomes().get("errors", 0)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("keep(socket.socket())", "DEAD  TCP *"),
        ("socket.socket()", "DROPPED  TCP *"),
        ("a, b = socket.socketpair(); keep(a); b.close()", "LEAKED  UNIX *"),
        (
            "server = listener(); keep(socket.create_connection(server.getsockname()));"
            "server.accept()[0].close(); server.close()",
            "LEAKED  TCP to 127.0.0.1:* *",
        ),
        ("a, b = socket.socketpair(); keep((a.makefile(), b)); a.close()", "LINGERING  UNIX *"),
        ("keep(socket.socket(type=socket.SOCK_DGRAM))", "NEVER CLOSED  UDP *"),
        ("keep(listener())", "NEVER CLOSED  TCP at 127.0.0.1:* *"),
        ("keep(socket.socket().detach())", "*its socket object gave the descriptor away*"),
    ],
    ids=["open", "dropped", "left_by_its_peer", "close_wait", "makefile", "udp", "listener", "fd"],
)
def test_a_socket_of_a_test_that_is_left_behind_is_an_error_of_that_test(suite, body, line):
    result = suite.fail(f"def test_it():\n    {body}\n\ndef test_other(): pass\n")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_it*", line])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    "body",
    [
        "socket.socket().close()",
        "with socket.socket(): pass",
        "import os; a, b = socket.socketpair(); a.close(); os.close(b.detach())",
    ],
)
def test_a_socket_that_is_closed_is_none(suite, body):
    result = suite.fail(f"def test_it():\n    {body}\n")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*socket leaks*")


def test_a_socket_of_a_function_scoped_fixture_is_its_tests(suite):
    result = suite.fail(
        """
@pytest.fixture
def sock():
    return keep(socket.socket())

@pytest.fixture
def closing():
    with socket.socket() as sock:
        yield sock

def test_it(sock, closing): pass
def test_other(closing): pass
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of *test_it _*", "leaked 1 socket *", "*in sock()"]
    )


@pytest.mark.usefixtures("no_automatic_collection")
def test_a_socket_in_a_reference_cycle_is_reported_as_kept_until_collected(suite):
    result = suite.fail(
        """
class Node: pass

def test_it():
    node = Node()
    node.itself, node.sock = node, socket.socket()
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["DROPPED*", "*in a reference cycle*"])


def test_sockets_of_an_import_or_between_tests_have_no_owner(suite):
    suite.pytester.makeconftest(
        """
import socket
KEPT = [socket.socket()]
def pytest_runtest_logreport(report):
    KEPT.append(socket.socket())
"""
    )
    result = suite.fail("keep(socket.socket())\ndef test_it(): pass\ndef test_other(): pass\n")
    result.assert_outcomes(passed=2)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="asyncio makes no loop unasked")
def test_the_loop_that_asyncio_makes_for_a_thread_that_has_none_has_no_owner(suite):
    result = suite.fail(
        """
def test_it():
    asyncio.set_event_loop_policy(None)
    asyncio.get_event_loop_policy().get_event_loop()
def test_other():
    asyncio.get_event_loop_policy().set_event_loop(None)
    gc.collect()
""",
        apart=True,
    )
    result.assert_outcomes(passed=2)


def test_a_loop_that_a_test_makes_and_forgets_is_its_own(suite):
    result = suite.fail("def test_it():\n    keep(asyncio.new_event_loop())\n", apart=True)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*leaked 2 sockets*"])


def test_a_loop_that_is_collected_is_one_object_also_where_its_sockets_are_the_first(suite):
    result = suite.fail(
        """
def run():
    asyncio.new_event_loop().run_until_complete(asyncio.sleep(0))
def test_it():
    run()
    gc.collect()
""",
        apart=True,
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["UNCLOSED  asyncio event loop with 2 sockets*", "*opened*test_it.py:* in run()"]
    )
    result.stdout.no_fnmatch_line("*leaked 2 sockets*")


def test_what_the_traceback_of_a_failure_keeps_is_no_second_error(suite):
    result = suite.fail(
        """
def test_it():
    sock = socket.socket()
    assert sock is None

@pytest.mark.xfail
def test_known():
    sock = socket.socket()
    assert sock is None

def test_fails_and_leaks():
    keep(socket.socket())
    assert 0

def test_last(): gc.collect()
"""
    )
    result.assert_outcomes(failed=2, xfailed=1, passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_fails_and_leaks*"])


def test_a_teardown_that_fails_reports_the_leak_too(suite):
    result = suite.fail(
        """
@pytest.fixture
def bad():
    yield
    raise ValueError("of the teardown")

def test_it(bad): keep(socket.socket())
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ValueError: of the teardown*", "*leaked 1 socket*"])


def test_one_leak_fails_no_other_test(suite):
    result = suite.fail(
        """
def test_leaks(): keep(socket.socket())
def test_drops_it(): KEPT.clear(); gc.collect()
def test_last(): pass
"""
    )
    result.assert_outcomes(passed=3, errors=1)


def test_a_dropped_socket_belongs_to_the_test_that_opened_it_however_late_it_is_dropped(suite):
    result = suite.fail(
        """
PROCEED, DONE = threading.Event(), threading.Event()

def late():
    PROCEED.wait(5)
    socket.socket()
    DONE.set()

def test_a(): threading.Thread(target=late).start()
def test_b():
    PROCEED.set()
    assert DONE.wait(5)
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_it.py::test_a*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_each_run_of_a_repeated_test_is_reported_for_its_own_sockets(suite):
    suite.pytester.makeconftest(
        """
from _pytest.runner import runtestprotocol
def pytest_runtest_protocol(item, nextitem):
    for _ in range(3):
        runtestprotocol(item, nextitem=nextitem)
    return True
"""
    )
    suite.write(
        """
RUNS = []
def test_it():
    socket.socket().close()
    RUNS.append(keep(socket.socket()) if RUNS else None)
"""
    )
    findings = suite.findings(None)
    assert [(each["owner"], each["nodeid"]) for each in findings] == [
        (f"test_it.py::test_it (run {run})", "test_it.py::test_it") for run in (2, 3)
    ]
