"""Beside the other plugins, and the other ways in which pytest runs and stops tests."""

from __future__ import annotations

import pytest

LEAKY = "def test_leaks(): keep(socket.socket())\ndef test_fine(): pass\n"


def reported(result):
    """The fixtures and tests that the summary names."""
    lines = result.outlines
    begun = next((n for n, line in enumerate(lines) if "= socket leaks =" in line), len(lines))
    return [line.strip() for line in lines[begun:] if line.startswith("    ")]


# Async tests


@pytest.mark.parametrize("scope", ["function", "module", "session"])
def test_pytest_asyncio_tests_and_fixtures(suite, scope):
    result = suite.fail(
        f"""
import pytest_asyncio
pytestmark = pytest.mark.asyncio(loop_scope="{scope}")

async def serve(reader, writer):
    writer.close()

@pytest_asyncio.fixture(scope="{scope}", loop_scope="{scope}")
async def address():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()

async def connect(address):
    return await asyncio.open_connection(*address)

async def test_leaks(address):
    keep(await asyncio.create_task(connect(address)))

async def test_closes(address):
    _, writer = await connect(address)
    writer.close()

async def test_waits(address):
    _, writer = await connect(address)
    writer.close()
    await writer.wait_closed()
""",
        "-p",
        "pytest_asyncio.plugin",
        "--socket-leaks-grace=0.3",
        # What a loop leaves behind complains when it is collected.
        apart=True,
    )
    result.assert_outcomes(passed=3, errors=1)
    assert reported(result) == ["test_it.py::test_leaks"]


def test_an_async_fixture_that_leaks_is_named(suite):
    result = suite.fail(
        """
import pytest_asyncio

@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client():
    yield keep(socket.socket())

@pytest.mark.asyncio(loop_scope="module")
async def test_it(client): pass
""",
        "-p",
        "pytest_asyncio.plugin",
        apart=True,
    )
    result.assert_outcomes(passed=1, errors=1)
    assert reported(result) == ["module fixture 'client' of test_it.py (test_it.py:35)"]


@pytest.mark.parametrize("scope", ["function", "module"])
def test_anyio_tests_and_fixtures(suite, scope):
    result = suite.fail(
        f"""
import anyio
pytestmark = pytest.mark.anyio

@pytest.fixture(scope="module")
def anyio_backend(): return "asyncio"

@pytest.fixture(scope="{scope}")
async def address(anyio_backend):
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as server:
        async with anyio.create_task_group() as group:
            group.start_soon(server.serve, serve)
            yield server.extra(anyio.abc.SocketAttribute.local_address)
            group.cancel_scope.cancel()

async def serve(stream):
    await stream.aclose()

@pytest.fixture
async def own(address): return keep(socket.socket())

async def connect(address): keep(await anyio.connect_tcp(*address))

async def test_leaks(address):
    async with anyio.create_task_group() as group:
        group.start_soon(connect, address)

async def test_of_a_fixture(own): pass

async def test_fine(address):
    async with await anyio.connect_tcp(*address): pass
""",
        "-p",
        "anyio.pytest_plugin",
        "--socket-leaks-grace=0.3",
        # What a loop leaves behind complains when it is collected.
        apart=True,
    )
    result.assert_outcomes(passed=3, errors=2)
    assert sorted(reported(result)) == ["test_it.py::test_leaks", "test_it.py::test_of_a_fixture"]


def test_to_thread_carries_the_test_along(suite):
    result = suite.fail(
        """
def test_it(): asyncio.run(asyncio.to_thread(lambda: keep(socket.socket()) and None))
def test_other(): pass
""",
        apart=True,
    )
    result.assert_outcomes(passed=2, errors=1)
    assert reported(result) == ["test_it.py::test_it"]


# Other ways to run tests


def test_workers_of_xdist_report_to_the_controller(suite):
    suite.write(
        LEAKY
        + """
@pytest.fixture(scope="module")
def client(): return keep(socket.socket())
@pytest.mark.xdist_group("same")
def test_of_a_fixture(client): pass
PROCEED, DONE = threading.Event(), threading.Event()
def late():
    PROCEED.wait(5)
    socket.socket()
    DONE.set()
@pytest.mark.xdist_group("same")
def test_late(): threading.Thread(target=late).start()
@pytest.mark.xdist_group("same")
def test_that_notices():
    PROCEED.set()
    DONE.wait(5)
@pytest.mark.allow_socket_leaks(reason="of old")
def test_waiver(): pass
"""
    )
    result = suite.fail(
        None, "-p", "xdist.plugin", "-n2", "--dist=loadgroup", "--socket-leaks-json=x.jsonl",
        "--junitxml=junit.xml",
    )  # fmt: skip
    result.assert_outcomes(passed=6, errors=3)
    text = "\n".join(reported(result))
    for name in ("::test_leaks", "module fixture 'client'", "::test_late"):
        assert name in text
    result.stdout.fnmatch_lines(["*test_waiver no longer leaks: remove its marker*"])
    assert len((suite.pytester.path / "x.jsonl").read_text().splitlines()) == 3
    assert (suite.pytester.path / "junit.xml").read_text().count('name="socket_leaks"') >= 2


def test_a_test_that_is_run_again_is_checked_in_each_run(suite, monkeypatch):
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    result = suite.fail(
        """
RUNS = []
def test_leaks_once():
    RUNS.append(1)
    if len(RUNS) == 1:
        keep(socket.socket())
def test_leaks(): keep(socket.socket())
""",
        "--reruns=1",
        apart=True,
    )
    outcomes = result.parseoutcomes()
    assert (outcomes["rerun"], outcomes["errors"]) == (2, 1)


def test_a_report_that_another_plugin_drops_does_not_move_the_next_tests_error(suite):
    suite.pytester.makeconftest(
        """
import pytest
from _pytest.runner import runtestprotocol

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    for report in runtestprotocol(item, log=False):
        if item.name != "test_leaks" or report.when != "teardown":
            item.ihook.pytest_runtest_logreport(report=report)
    return True
"""
    )
    result = suite.fail(
        """
def test_leaks(): keep(socket.socket())

@pytest.fixture
def broken():
    yield
    raise OSError("boom")

def test_with_an_error_of_its_own(broken): pass
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["ERROR *test_with_an_error_of_its_own - OSError: boom"])


def test_a_test_that_times_out_leaks_nothing_that_its_traceback_keeps(suite):
    result = suite.fail(
        """
@pytest.mark.timeout(1.5, method="signal")
def test_it():
    sock = socket.socket()
    time.sleep(5)
def test_other(): pass
""",
        "-p",
        "pytest_timeout",
    )
    result.assert_outcomes(failed=1, passed=1)


def test_doctests(suite):
    suite.pytester.maketxtfile(
        test_doc=">>> import socket\n>>> sock = socket.socket()\n", test_fine=">>> 1\n1\n"
    )
    result = suite.fail(None)
    result.assert_outcomes(passed=2, errors=1)
    assert reported(result) == ["test_doc.txt::test_doc.txt"]


def test_with_pdb_the_teardown_of_a_test_case_comes_late_and_counts(suite):
    result = suite.fail(
        """
import unittest
class TestIt(unittest.TestCase):
    def setUp(self): self.sock = socket.socket()
    def tearDown(self): self.sock.close()
    def test_it(self): pass
""",
        "--pdb",
    )
    result.assert_outcomes(passed=1)


def test_with_x_the_run_stops_at_the_first_leak_and_fixtures_are_checked(suite):
    result = suite.fail(
        """
@pytest.fixture(scope="session")
def client(): return keep(socket.socket())
def test_leaks(client): keep(socket.socket())
def test_never(client): pass
""",
        "-x",
    )
    result.assert_outcomes(passed=1, errors=2)
    assert sorted(reported(result)) == [
        "session fixture 'client' (test_it.py:33)",
        "test_it.py::test_leaks",
    ]


def test_pytest_exit_ends_the_run_without_reporting_leaks(suite):
    result = suite.fail(
        """
def test_it():
    keep(socket.socket())
    pytest.exit("enough")
"""
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.no_fnmatch_line("*leaked*")


def test_what_is_opened_after_pytest_exit_is_not_the_test_s(suite):
    suite.pytester.makeconftest(
        """
import pytest, socket
KEPT = []
@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish():
    KEPT.append(socket.socket())
"""
    )
    result = suite.fail(
        """
def test_it():
    socket.socket().close()
    pytest.exit("enough", returncode=7)
"""
    )
    assert result.ret == 7
    result.stdout.no_fnmatch_line("*leaked*")


def test_subtests(suite):
    if not hasattr(pytest, "Subtests"):
        pytest.skip("this pytest has none of its own")
    result = suite.fail(
        """
def test_it(subtests):
    for number in range(3):
        with subtests.test(number=number):
            if number == 1:
                keep(socket.socket())
            assert number != 2
"""
    )
    assert result.parseoutcomes()["errors"] == 1
    assert reported(result) == ["test_it.py::test_it"]


def test_a_run_of_pytest_within_a_test(suite):
    """Each reports its own tests: the inner one its test, the outer one the test around."""
    result = suite.fail(
        """
pytest_plugins = "pytester"

def test_around(pytester):
    pytester.makepyfile('''
import socket
KEPT = []
def test_inner(): KEPT.append(socket.socket())
''')
    options = ("--socket-leaks=fail", "-p", "closewait_guard.pytest_plugin")
    result = pytester.runpytest_inprocess(*options)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_inner*"])

def test_after(): pass
"""
    )
    result.assert_outcomes(passed=2, errors=1)
    assert reported(result)[-1] == "test_it.py::test_around"


def test_in_random_order_the_same_tests_are_reported(suite):
    source = "".join(
        f"def test_{n}(pool): "
        + ("keep(socket.socket())\n" if n in (2, 5) else "pool.connection()\n")
        for n in range(8)
    )
    pool = """
@pytest.fixture(scope="module")
def pool():
    pool = Pool()
    yield pool
    pool.close()
"""
    for seed in ("1", "2", "3"):
        result = suite.fail(pool + source, "-p", "pytest_randomly", f"--randomly-seed={seed}")
        result.assert_outcomes(passed=8, errors=2)
        assert sorted(reported(result)) == ["test_it.py::test_2", "test_it.py::test_5"]


def test_beside_pytest_socket_and_pytest_cov(suite, monkeypatch):
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    result = suite.fail(
        """
def test_refused():
    with pytest.raises(Exception, match="socket"):
        socket.socket()

@pytest.mark.enable_socket
def test_leaks(): keep(socket.socket())

@pytest.mark.enable_socket
def test_fine(): socket.socket().close()
""",
        "--disable-socket",
        "--cov=.",
        apart=True,
    )
    result.assert_outcomes(passed=3, errors=1)
    assert reported(result) == ["test_it.py::test_leaks"]


def test_it_can_be_left_out(suite, monkeypatch):
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    result = suite.run(LEAKY, "-p", "no:closewait_guard", apart=True)
    result.assert_outcomes(passed=2)
    result = suite.run(None, "-p", "no:closewait_guard", "--socket-leaks=fail", apart=True)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
