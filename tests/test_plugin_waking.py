"""Before the first socket or thread of a run nothing is watched, and nothing is missed."""

from __future__ import annotations

import pytest

PREFIX = "def test_without_sockets(): pass\n"


def told(suite):
    """The tests and fixtures that fail for a leak."""
    found = suite.leaks(None)
    return [finding["owner"] for finding in found if finding["outcome"] == "failed"]


def test_a_run_without_sockets_and_threads_never_hooks_its_phases(suite):
    suite.pytester.makeconftest(
        """
import pytest
@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    plugins = session.config.pluginmanager
    names = ("phases", "asleep", "outbox", "end_of_phase")
    print([plugins.has_plugin(f"closewait_guard_{name}") for name in names])
"""
    )
    result = suite.fail(PREFIX, "-s")
    result.stdout.fnmatch_lines(["*[[]False, True, False, False]*"])
    result = suite.fail(PREFIX + "def test_socket(): socket.socket().close()\n", "-s")
    result.stdout.fnmatch_lines(["*[[]True, False, False, False]*"])


FIRST = {
    "set-up": (
        """
@pytest.fixture
def own(): keep(socket.socket())
def test_first(own): pass
""",
        ["test_it.py::test_first"],
    ),
    "body": ("def test_first(): keep(socket.socket())", ["test_it.py::test_first"]),
    "teardown": (
        """
@pytest.fixture
def own():
    yield
    keep(socket.socket())
def test_first(own): pass
""",
        ["test_it.py::test_first"],
    ),
    "failing teardown": (
        """
@pytest.fixture
def own():
    yield
    keep(socket.socket())
    raise KeyError
def test_first(own): pass
""",
        ["test_it.py::test_first"],
    ),
    "set-up of a wider fixture": (
        """
@pytest.fixture(scope="module")
def wide(): keep(socket.socket())
def test_first(wide): pass
""",
        ["module fixture 'wide' of test_it.py"],
    ),
    "set-up of a wider fixture, then of the test's own": (
        """
@pytest.fixture(scope="module")
def wide(): socket.socket().close()
@pytest.fixture
def own(wide): keep(socket.socket())
def test_first(own): pass
""",
        ["test_it.py::test_first"],
    ),
    "end of a wider fixture": (
        """
@pytest.fixture(scope="module")
def wide():
    yield
    keep(socket.socket())
def test_first(wide): pass
""",
        ["module fixture 'wide' of test_it.py"],
    ),
    "what an earlier fixture keeps": (
        """
@pytest.fixture(scope="module")
def wide(): return []
def test_before(wide): pass
def test_first(wide): wide.append(socket.socket())
""",
        ["module fixture 'wide' of test_it.py"],
    ),
    "thread of an earlier test": (
        """
PROCEED, DONE = threading.Event(), threading.Event()
def late():
    PROCEED.wait(5)
    keep(socket.socket())
    DONE.set()
def test_starts(): threading.Thread(target=late).start()
def test_waits():
    PROCEED.set()
    DONE.wait(5)
""",
        ["test_it.py::test_starts"],
    ),
    "task that outlives its test": (
        """
@pytest.fixture(scope="module")
def made():
    made = []
    yield made
    loop, task, ready = made
    ready.set_result(None)
    loop.run_until_complete(task)
    loop.close()
async def late(ready):
    await ready
    keep(socket.socket())
def test_starts(made):
    loop = asyncio.new_event_loop()
    ready = loop.create_future()
    made += [loop, loop.create_task(late(ready)), ready]
def test_waits(made): pass
""",
        ["test_it.py::test_starts"],
    ),
    "call after a subtest": (
        """
import unittest
class TestIt(unittest.TestCase):
    def test_first(self):
        socket.socket().close()
        with self.subTest(): pass
        keep(socket.socket())
""",
        ["test_it.py::TestIt::test_first"],
    ),
}


@pytest.mark.parametrize("before", ["", PREFIX], ids=["first test", "later test"])
@pytest.mark.parametrize("where", FIRST)
def test_the_first_socket_of_a_run_is_its_makers(suite, where, before):
    source, owners = FIRST[where]
    suite.write(before + source)
    assert told(suite) == owners


@pytest.mark.parametrize("when", ["setup", "call", "teardown"])
@pytest.mark.parametrize("test", ["pass", "socket.socket().close()"])
def test_what_another_plugin_opens_for_a_report_is_nobodys(suite, when, test):
    suite.pytester.makeconftest(
        f"""
import socket
KEPT = []
def pytest_runtest_logreport(report):
    if report.when == "{when}" and not KEPT:
        KEPT.append(socket.socket())
"""
    )
    suite.write(f"def test_first(): {test}\ndef test_second(): {test}\n")
    assert told(suite) == []
