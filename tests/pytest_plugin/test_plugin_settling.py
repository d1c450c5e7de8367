"""Sockets get time to close; there is no wait and no garbage collection without a suspect."""

from __future__ import annotations

import gc
import threading
from itertools import pairwise

import pytest

from closewait_guard import _clock
from closewait_guard.pytest_plugin import _attribution
from servers import web


def test_a_socket_that_another_thread_closes_in_time_is_none(suite):
    result = suite.fail(
        """
def test_it():
    sock = socket.socket()
    threading.Timer(0.1, sock.close).start()
""",
        "--socket-leaks-grace=5",
    )
    result.assert_outcomes(passed=1)


def test_the_callbacks_of_an_idle_loop_are_run(suite):
    result = suite.fail(
        """
@pytest.fixture(scope="session")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()

def test_it(loop):
    async def connect():
        with listener() as server:
            _, writer = await asyncio.open_connection(*server.getsockname())
            writer.close()
    loop.run_until_complete(connect())

def test_other(loop): pass
""",
        "--socket-leaks-grace=2",
    )
    result.assert_outcomes(passed=2)


COUNTED = """
COLLECTIONS = []
SLEEPS = []

def pytest_sessionstart():
    import gc
    from closewait_guard import _clock
    original, slept = gc.collect, _clock.nap
    gc.collect = lambda *given: COLLECTIONS.append(given) or original(*given)
    _clock.nap = lambda wait: SLEEPS.append(wait) or slept(wait)

def pytest_runtest_logfinish():
    print("COUNTED", len(COLLECTIONS), SLEEPS)
    COLLECTIONS.clear(), SLEEPS.clear()

def pytest_unconfigure():
    import gc
    from closewait_guard import _clock
    gc.collect = gc.collect.__closure__[0].cell_contents
    _clock.nap = _clock.nap.__closure__[0].cell_contents
"""


@pytest.fixture
def counted(suite, monkeypatch):
    """Runs one test; the number of collections, and the waits, at its end."""

    def run(body, grace="0.05"):
        monkeypatch.setattr(gc, "collect", gc.collect)
        monkeypatch.setattr(_clock, "nap", _clock.nap)
        suite.pytester.makeconftest(COUNTED)
        result = suite.fail(body, f"--socket-leaks-grace={grace}", "-s")
        [line] = [line for line in result.outlines if "COUNTED" in line]
        _, collections, waits = line[line.index("COUNTED") :].split(" ", 2)
        return int(collections), [float(wait) for wait in re_split(waits)]

    return run


def re_split(waits):
    return [wait for wait in waits.strip("[]").split(", ") if wait]


def test_without_a_suspect_there_is_no_wait_and_no_collection(counted):
    assert counted("def test_it(): socket.socket().close()\n") == (0, [])


def test_what_a_wider_fixture_keeps_is_not_waited_for(counted):
    pool = """
@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.close()
def test_it(pool): pool.connection()
"""
    assert counted(pool) == (0, [])


def test_a_dropped_socket_is_certain_at_once(counted):
    assert counted("def test_it(): socket.socket()\n") == (0, [])


def test_waits_double_up_to_the_grace_time_and_garbage_is_collected_once(counted):
    collections, waits = counted("def test_it(): keep(socket.socket())\n", grace="0.2")
    assert collections == 1
    # On a busy machine the first is over before it has begun.
    assert waits[0] == pytest.approx(0.001, rel=0.1) or waits[0] == pytest.approx(0.002, rel=0.1)
    assert all(later == pytest.approx(2 * wait, rel=0.1) for wait, later in pairwise(waits[:-1]))
    assert sum(waits) <= 0.2


def test_a_loop_without_the_usual_parts_does_not_break_the_check(suite):
    """A loop of another class, without the parts that asyncio's have."""
    result = suite.fail(
        """
class Strange(asyncio.AbstractEventLoop):
    def is_running(self): return False
    def is_closed(self): return False
KEPT.append(Strange())

def test_it(): keep(socket.socket())
"""
    )
    result.assert_outcomes(passed=1, errors=1)


def test_thread_starts_are_noted_without_a_trace():
    found, seen = threading.Thread.start, []
    _attribution.add_thread_start_callback(seen.append)
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert seen == [thread]
    _attribution.remove_thread_start_callback(seen.append)
    assert threading.Thread.start is found


def test_a_patch_of_threads_by_another_library_stays_over_ours():
    found, seen = threading.Thread.start, []
    _attribution.add_thread_start_callback(seen.append)
    ours = threading.Thread.start
    theirs = lambda self: ours(self)  # noqa: E731
    threading.Thread.start = theirs
    _attribution.remove_thread_start_callback(seen.append)
    assert threading.Thread.start is theirs
    _attribution.add_thread_start_callback(seen.append)
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert seen == [thread]
    threading.Thread.start = ours
    _attribution.remove_thread_start_callback(seen.append)
    assert threading.Thread.start is found


def test_event_loops_that_are_closed_only_by_the_collector_are_reported_each_time(suite):
    result = suite.fail(
        """
@pytest.mark.parametrize("time", range(20))
def test_leaks(time):
    loop = asyncio.new_event_loop()
    loop.itself = loop

def test_closes():
    loop = asyncio.new_event_loop()
    loop.itself = loop
    loop.close()
"""
    )
    result.assert_outcomes(passed=21, errors=20)
    result.stdout.fnmatch_lines(["test_it.py:*: 20 unclosed objects leaked by 20 tests"])
    assert "leaked 1 unclosed object (garbage-collected while open)" in result.stdout.str()


UNCLOSED_LOOP = """
pytestmark = pytest.mark.filterwarnings("error")

{marker}
def test_leaks():
    loop = asyncio.new_event_loop()
    loop.itself = loop

def test_innocent(): pass
"""


@pytest.mark.parametrize(
    ("marker", "reason"),
    [
        ("", "event loop never closed"),
        ("@pytest.mark.socket_leaks('warn')", "unraisable|PytestUnraisableExceptionWarning"),
    ],
)
def test_what_the_checks_collection_raises_is_booked_on_the_test_itself(suite, marker, reason):
    result = suite.fail(UNCLOSED_LOOP.format(marker=marker), "-rE", apart=True)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.re_match_lines([f"ERROR test_it.py::test_leaks - .*({reason})"])
    result.stdout.re_match_lines([r".*unclosed <socket\.socket|.*unclosed event loop"])


def test_what_the_checks_collection_raises_is_shown_beside_another_error_of_the_teardown(suite):
    result = suite.fail(
        UNCLOSED_LOOP.format(marker="")
        + """
@pytest.fixture
def broken():
    yield
    raise RuntimeError("of the fixture")

def test_broken(broken):
    test_leaks()

def test_innocent_too(): pass
""",
        "-k",
        "broken or innocent",
        apart=True,
    )
    result.assert_outcomes(passed=3, errors=1, deselected=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_broken _*",
            "*RuntimeError: of the fixture*",
            "*Captured socket leaks teardown*",
            "leaked 1 unclosed object *",
        ]
    )
    result.stdout.re_match_lines([r".*unclosed <socket\.socket|.*unclosed event loop"])


FAILED_SETUP = """
pytestmark = pytest.mark.filterwarnings("error")

def make_socket():
    return socket.socket()

def make_transport():
    loop = asyncio.new_event_loop()
    connect = asyncio.open_connection(*LISTENER.getsockname())
    reader, writer = loop.run_until_complete(connect)
    writer.loop = loop
    return writer

LISTENER = listener()

@pytest.fixture
def broken(request):
    kept = [globals()[request.param]()]
    kept.append(kept)
    raise RuntimeError("the set-up fails")

@pytest.mark.parametrize("broken", ["{make}"], indirect=True)
def test_broken(broken): pass

def test_innocent():
    threading.Timer(0.1, socket.socket().close).start()

def test_innocent_too(): pass
"""


@pytest.mark.parametrize("make", ["make_socket", "make_transport"])
def test_what_another_tests_socket_raises_in_the_checks_collection_is_a_warning_of_that_test(
    suite, make
):
    result = suite.run(
        FAILED_SETUP.format(make=make),
        "--socket-leaks=fail",
        "--socket-leaks-grace=5",
        "-rE",
        apart=True,
    )
    result.assert_outcomes(
        passed=2,
        errors=1,
    )
    result.stdout.fnmatch_lines(
        [
            f"test_it.py::test_broken[[]{make}]",
            "*test_it.py:*: PytestUnraisableExceptionWarning: ResourceWarning: unclosed *",
            "*(found by the socket check of test_it.py::test_innocent)",
            f"ERROR test_it.py::test_broken[[]{make}] - RuntimeError: the set-up fails",
        ]
    )
    assert "Traceback" not in result.stderr.str()


def test_what_a_wider_fixtures_socket_raises_in_a_check_is_no_error_of_the_last_test(suite):
    result = suite.fail(
        """
pytestmark = pytest.mark.filterwarnings("error")

@pytest.fixture(scope="module")
def wide():
    kept = [socket.socket()]
    kept.append(kept)

def test_innocent(wide): pass
""",
        "-rE",
        apart=True,
    )
    result.assert_outcomes(passed=1, errors=1, warnings=1)
    result.stdout.fnmatch_lines(
        [
            "*PytestUnraisableExceptionWarning: ResourceWarning: unclosed *",
            "*(found by the socket check of *)",
            "ERROR test_it.py::test_innocent - test_it.py:* fixture 'wide' leaked *",
        ]
    )


OWNERS = """
import aiohttp, httpx

@pytest.fixture
def url():
    return "URL"

async def get(url, is_closed):
    session = aiohttp.ClientSession()
    async with session.get(url) as response:
        await response.read()
    if is_closed:
        await session.close()

def test_closes(url):
    asyncio.run(get(url, True))
    with httpx.Client() as client:
        client.get(url)

def test_forgets_a_session(url):
    asyncio.run(get(url, False))

def test_innocent(url):
    asyncio.run(get(url, True))
    gc.collect()

def test_forgets_a_client(url):
    httpx.Client().get(url)

def test_innocent_too(url):
    gc.collect()
"""


@pytest.mark.parametrize("workers", [(), ("-n1", "-p", "xdist")], ids=["alone", "xdist"])
def test_a_session_that_a_test_forgets_fails_it_though_the_library_closes_its_sockets(
    suite, workers
):
    pytest.importorskip("aiohttp")
    pytest.importorskip("httpx")
    with web() as server:
        result = suite.fail(OWNERS.replace("URL", server.url), "-rE", *workers, apart=True)
    result.assert_outcomes(passed=5, errors=2)
    result.stdout.fnmatch_lines_random(
        [
            "ERROR test_it.py::test_forgets_a_session - line * (aiohttp.ClientSession nev*",
            "ERROR test_it.py::test_forgets_a_client - line * (httpx.Client nev*",
            "*UNCLOSED  aiohttp.ClientSession with 1 socket to 127.0.0.1:*",
            "*session = aiohttp.ClientSession()",
            "*httpx.Client().get(url)",
        ]
    )


MANY_CLIENTS = """
import httpx
from closewait_guard._libraries import kinds

ASKED, REAL = [], kinds.layers_of
kinds.layers_of = lambda thing: ASKED.append(thing) or REAL(thing)

@pytest.fixture(scope="session", autouse=True)
def clients():
    listener().close()  # From the first socket on, clients are recorded.
    clients = [httpx.Client() for _ in range(3)]
    for client in clients:
        client.get("URL")
    yield
    for client in clients:
        client.close()

def test_leaks(): socket.socket()

@pytest.mark.parametrize("number", range(20))
def test_closes(number):
    socket.socket().close()
    ASKED.clear() if number == 0 else None

def test_asked(): assert not ASKED
"""


def test_what_open_clients_keep_is_not_looked_through_after_each_test_that_follows_a_leak(suite):
    pytest.importorskip("httpx")
    with web() as server:
        result = suite.fail(MANY_CLIENTS.replace("URL", server.url), apart=True)
    result.assert_outcomes(passed=22, errors=1)
