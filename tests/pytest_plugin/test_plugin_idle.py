"""Before the first socket or thread of a run no test is followed, and none is missed."""

from __future__ import annotations

import pytest

PREFIX = "def test_without_sockets(): pass\n"


def reported(suite):
    """The tests and fixtures that fail for a leak."""
    found = suite.findings(None)
    return [finding["owner"] for finding in found if finding["outcome"] == "failed"]


def test_a_run_without_sockets_and_threads_never_hooks_its_phases(suite):
    suite.pytester.makeconftest(
        """
import pytest
@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    plugins = session.config.pluginmanager
    names = ("test_phases", "idle", "pending_findings", "between_phases", "call_phase")
    print([plugins.has_plugin(f"closewait_guard_{name}") for name in names])
"""
    )
    result = suite.fail(PREFIX, "-s")
    result.stdout.fnmatch_lines(["*[[]False, True, False, False, False]*"])
    result = suite.fail(PREFIX + "def test_socket(): socket.socket().close()\n", "-s")
    result.stdout.fnmatch_lines(["*[[]True, False, False, False, False]*"])
    allowed = "@pytest.mark.allow_socket_leaks(reason='a test')\n"
    suite.pytester.syspathinsert()
    suite.pytester.makepyfile(helper="def pytest_runtest_logreport(report): pass")
    source = PREFIX + allowed + "def test_socket(): socket.socket().close()\n"
    result = suite.fail(source, "-s", "-p", "helper")
    result.stdout.fnmatch_lines(["*[[]True, False, True, True, True]*"])


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
def test_the_first_socket_of_a_run_has_its_owner(suite, where, before):
    source, owners = FIRST[where]
    suite.write(before + source)
    assert reported(suite) == owners


REPORTER = """
class Reporter:
    def {hook}(self, {arguments}):
        keep(socket.socket())
"""


@pytest.mark.parametrize(
    ("hook", "arguments"),
    [
        ("pytest_runtest_makereport", "item, call"),
        ("pytest_runtest_logreport", "report"),
        ("pytest_exception_interact", "node, call, report"),
    ],
)
def test_what_a_plugin_registered_in_the_middle_of_a_run_opens_is_no_tests(suite, hook, arguments):
    source = (
        REPORTER.format(hook=hook, arguments=arguments)
        + """
def test_first(request):
    socket.socket().close()
    request.config.pluginmanager.register(Reporter())
def test_second():
    assert False
def test_third(): keep(socket.socket())
"""
    )
    suite.write(source)
    assert reported(suite) == ["test_it.py::test_third"]


def test_the_owner_stays_after_a_report_in_the_middle_of_a_test(suite):
    suite.pytester.makeconftest("def pytest_runtest_logreport(report): pass")
    suite.write(
        """
def test_first(request):
    socket.socket().close()
    request.config.hook.pytest_runtest_logreport(
        report=pytest.TestReport("x", ("x", 1, "x"), {}, "passed", None, "call")
    )
    keep(socket.socket())
def test_second(): pass
"""
    )
    assert reported(suite) == ["test_it.py::test_first"]


@pytest.mark.parametrize("when", ["setup", "call", "teardown"])
@pytest.mark.parametrize("test", ["pass", "socket.socket().close()"])
def test_what_another_plugin_opens_for_a_report_has_no_owner(suite, when, test):
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
    assert reported(suite) == []
