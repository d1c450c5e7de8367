"""`NoSocketLeaks`, the mixin of `closewait_guard.testing`, under unittest's runner and pytest's."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import unittest

import pytest

import closewait_guard as cwg
from closewait_guard._capture import patch
from closewait_guard.testing import NoSocketLeaks
from suites import suite  # noqa: F401 - a fixture

KEPT = []


@pytest.fixture(autouse=True)
def close_kept():
    yield
    while KEPT:
        KEPT.pop().close()


def keep(sock):
    KEPT.append(sock)
    return sock


class Sync(NoSocketLeaks, unittest.TestCase):
    __test__ = False  # They are run below.
    socket_leaks_grace = 0.05

    @classmethod
    def setUpClass(cls):
        cls.addClassCleanup(keep(socket.socket()).close)

    def test_leaks(self):
        keep(socket.socket())

    def test_closes_in_a_cleanup(self):
        self.addCleanup(keep(socket.socket()).close)

    def test_fails(self):
        keep(socket.socket())
        self.fail("as it should")

    def test_fails_in_a_subtest(self):
        keep(socket.socket())
        with self.subTest("first"):
            self.fail("as it should")

    def test_leaks_in_a_subtest(self):
        with self.subTest("first"):
            keep(socket.socket())

    @unittest.expectedFailure
    def test_is_expected_to_fail(self):
        sock = socket.socket()
        self.addCleanup(KEPT.append, sock)
        self.fail("as it should")

    @unittest.expectedFailure
    def test_is_expected_to_fail_and_passes(self):
        keep(socket.socket())

    @unittest.skip("not here")
    def test_is_skipped(self):
        keep(socket.socket())

    def test_is_skipped_on_the_way(self):
        keep(socket.socket())
        self.skipTest("not now")


class Async(NoSocketLeaks, unittest.IsolatedAsyncioTestCase):
    __test__ = False
    socket_leaks_grace = 0.2

    async def asyncSetUp(self):
        async def serve(reader, writer):
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.address = server.sockets[0].getsockname()
        self.addAsyncCleanup(server.wait_closed)
        self.addCleanup(server.close)

    async def test_leaves_a_transport_that_is_closing(self):
        _, writer = await asyncio.open_connection(*self.address)
        writer.close()

    async def test_leaves_a_task_that_unittest_cancels(self):
        async def hold():
            with socket.socket():
                await asyncio.sleep(60)

        self.task = asyncio.create_task(hold())
        await asyncio.sleep(0)

    async def test_leaks(self):
        sock = keep(socket.create_connection(self.address))
        sock.setblocking(False)


class Lenient(NoSocketLeaks, unittest.TestCase):
    __test__ = False
    socket_leaks_grace = 0.05
    socket_leaks_allow_open = True

    def test_keeps_a_healthy_connection(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            keep(socket.create_connection(server.getsockname()))
            keep(server.accept()[0])


def run(case, name):
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromName(f"test_{name}", case).run(result)
    return result


def texts(found):
    return [text for _, text in found]


@pytest.mark.parametrize("case", [Sync, Async])
def test_a_test_that_leaks_fails_and_its_report_is_all_that_is_shown(case):
    result = run(case, "leaks")
    assert (result.testsRun, len(result.failures), result.errors) == (1, 1, [])
    [text] = texts(result.failures)
    assert f"in {case.__qualname__}.test_leaks()" in text
    # Python 3.11 shows two calls of unittest's own before the report of an async test.
    assert "_no_leaks.py" not in text
    assert "asyncio/" not in text


@pytest.mark.parametrize(
    "name",
    ["closes_in_a_cleanup", "is_expected_to_fail", "is_skipped", "is_skipped_on_the_way"],
)
def test_a_test_that_closes_or_is_excused_is_as_it_was(name):
    result = run(Sync, name)
    assert result.wasSuccessful()
    assert len(result.expectedFailures) == (name == "is_expected_to_fail")
    assert len(result.skipped) == name.count("skipped")


@pytest.mark.parametrize("name", ["fails", "fails_in_a_subtest"])
def test_a_test_that_has_failed_is_not_failed_again(name):
    result = run(Sync, name)
    assert len(result.failures) == 1
    assert "as it should" in texts(result.failures)[0]


@pytest.mark.parametrize("name", ["leaks_in_a_subtest", "is_expected_to_fail_and_passes"])
def test_a_leak_is_a_failure_of_the_test_itself(name):
    result = run(Sync, name)
    [text] = texts(result.failures)
    assert f"Sync.test_{name}()" in text


@pytest.mark.parametrize(
    "name", ["leaves_a_transport_that_is_closing", "leaves_a_task_that_unittest_cancels"]
)
def test_what_an_event_loop_closes_at_the_end_of_an_async_test_is_not_a_leak(name):
    result = run(Async, name)
    assert result.wasSuccessful(), result.failures + result.errors


def test_a_class_may_accept_healthy_connections():
    assert run(Lenient, "keeps_a_healthy_connection").wasSuccessful()


def test_the_check_waits_for_the_last_cleanups_whatever_the_test_calls_itself():
    class Restarting(NoSocketLeaks, unittest.TestCase):
        socket_leaks_grace = 0.05

        def setUp(self):
            self.sock = keep(socket.socket())

        def tearDown(self):
            self.doCleanups()
            self.sock.close()

        def test_closes(self):
            self.tearDown()
            self.setUp()

        def test_leaks(self):
            self.doCleanups()
            keep(socket.socket())

    assert run(Restarting, "closes").wasSuccessful()
    assert not patch.is_patched()
    assert "Restarting.test_leaks()" in texts(run(Restarting, "leaks").failures)[0]


def test_an_interrupt_leaves_nothing_behind():
    class Interrupted(NoSocketLeaks, unittest.TestCase):
        def test_it(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted, "it")
    assert run(Sync, "closes_in_a_cleanup").wasSuccessful()


def test_tests_in_several_threads_at_a_time_are_refused():
    entered, leave = threading.Event(), threading.Event()

    class Waiting(NoSocketLeaks, unittest.TestCase):
        def test_it(self):
            entered.set()
            assert leave.wait(10)

    results = []
    thread = threading.Thread(target=lambda: results.append(run(Waiting, "it")))
    thread.start()
    try:
        assert entered.wait(10)
        result = run(Sync, "closes_in_a_cleanup")
    finally:
        leave.set()
        thread.join()
    assert "tests run in several threads" in texts(result.errors)[0]
    assert results[0].wasSuccessful()
    assert run(Sync, "closes_in_a_cleanup").wasSuccessful()


def test_a_class_whose_check_would_not_be_called_is_refused():
    with pytest.raises(cwg.ConfigurationError, match="NoSocketLeaks must stand before TestCase"):
        type("Wrong", (unittest.TestCase, NoSocketLeaks), {})


def test_the_helper_for_one_test_needs_no_mixin():
    class Plain(unittest.TestCase):
        def setUp(self):
            self.enterContext(cwg.no_leaks(grace=0.05))

        def test_closes(self):
            self.enterContext(contextlib.closing(keep(socket.socket())))

        def test_leaks(self):
            keep(socket.socket())

    assert run(Plain, "closes").wasSuccessful()
    assert len(run(Plain, "leaks").failures) == 1


MODULE = """
import socket, unittest
import pytest
from closewait_guard.testing import NoSocketLeaks

KEPT = []

class TestIt(NoSocketLeaks, unittest.TestCase):
    socket_leaks_grace = 0.05

    def test_leaks(self): KEPT.append(socket.socket())

    @pytest.mark.allow_socket_leaks(reason="known")
    def test_may_leak(self): KEPT.append(socket.socket())
"""


@pytest.mark.parametrize(
    ("mode", "outcomes"),
    [("off", {"failed": 2}), ("warn", {"passed": 2}), ("fail", {"passed": 2, "errors": 1})],
)
def test_under_pytest_a_leak_is_reported_once(suite, mode, outcomes):  # noqa: F811
    suite.pytester.makepyfile(test_it=MODULE)
    result = suite.run(None, f"--socket-leaks={mode}", "--socket-leaks-grace=0.05")
    result.assert_outcomes(**outcomes)
