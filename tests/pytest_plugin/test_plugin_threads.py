"""What a thread or an event loop that still runs holds is left to it until the end of the run."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref

import pytest

from closewait_guard._holders import threads
from closewait_guard._live import shows_other_threads

STARTING = """
READY, GO_ON = threading.Event(), threading.Event()

def close_later():
    with socket.socket() as sock:
        READY.set()
        GO_ON.wait(60)

def drop_later():
    sock = socket.socket()
    READY.set()
    GO_ON.wait(60)

def start(function):
    socket.socket().close()
    thread = threading.Thread(target=function, name="worker", daemon=True)
    thread.start()
    assert READY.wait(60)
    return thread
"""
ENDING = """
def test_it(): THREADS.append(start({function}))
THREADS = []

def test_ends():
    GO_ON.set()
    THREADS.pop().join()
"""
RUNNING_ON = "def test_it(): start(close_later)\ndef test_other(): pass\n"

WIDER_LOOP = """
@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()

"""


def test_a_socket_that_a_thread_closes_long_after_its_test_is_no_leak(suite):
    result = suite.fail(STARTING + ENDING.format(function="close_later"))
    result.assert_outcomes(passed=2)
    result.stdout.no_fnmatch_line("*socket leaks*")


def test_a_socket_that_a_thread_drops_long_after_its_test_fails_that_test(suite):
    result = suite.fail(STARTING + ENDING.format(function="drop_later"), "-rE")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["ERROR test_it.py::test_it - line * (dropped): leaked 1 socket"])


def test_a_socket_that_a_running_thread_holds_is_warned_of(suite):
    result = suite.fail(STARTING + RUNNING_ON, apart=True)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [
            "test_it.py:*: 1 dead socket left to a running thread, process, loop or record*",
            "    test_it.py::test_it (thread worker still runs and holds it)",
        ]
    )


@pytest.mark.skipif(not shows_other_threads(), reason="variables of other threads cannot be read")
@pytest.mark.parametrize("wait", ["GO_ON.wait(60)", "LOCK.acquire(timeout=60)"])
@pytest.mark.parametrize("opened", ["socket.socket()", "contextlib.closing(socket.socket())"])
def test_a_socket_that_only_the_with_block_of_a_thread_holds_is_left_to_it(suite, opened, wait):
    source = f"""
import contextlib

READY, GO_ON, LOCK, THREADS = threading.Event(), threading.Event(), threading.Lock(), []

def hold():
    with {opened}:
        READY.set()
        {wait}

def test_it():
    THREADS.append(threading.Thread(target=hold, name="worker"))
    LOCK.acquire()
    THREADS[0].start()
    assert READY.wait(60)

def test_ends():
    LOCK.release()
    GO_ON.set()
    THREADS.pop().join()
"""
    suite.fail(source, apart=True).assert_outcomes(passed=2)


def test_a_socket_that_a_running_thread_holds_is_warned_of_under_xdist(suite):
    pytest.importorskip("xdist")
    result = suite.fail(STARTING + RUNNING_ON, "-p", "xdist", "-n1", apart=True)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*(gw0, thread worker still runs and holds it)"])


@pytest.mark.parametrize(
    ("marker", "option"),
    [("", "--socket-leaks-threads=fail"), ("@pytest.mark.socket_leaks(threads='fail')\n", "-q")],
)
def test_a_setting_decides_that_its_test_fails(suite, marker, option):
    result = suite.fail(STARTING + marker + RUNNING_ON, option, apart=True)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["leaked 1 socket *", "  thread worker still runs and holds it"])


def test_a_wrong_value_of_the_setting_is_refused(suite):
    result = suite.fail(STARTING + RUNNING_ON, "-o", "socket_leaks_threads=off")
    result.stderr.fnmatch_lines(["*socket_leaks_threads*: expected warn or fail, got 'off'"])


def test_the_findings_file_says_what_still_runs(suite):
    suite.fail(STARTING + RUNNING_ON, "--socket-leaks-json=leaks.jsonl", apart=True)
    [line] = (suite.pytester.path / "leaks.jsonl").read_text(encoding="utf-8").splitlines()
    finding = json.loads(line)
    assert finding["outcome"] == "still_running"
    assert finding["reason"] == "thread worker still runs and holds it"


def test_what_a_timer_is_to_close_is_left_to_it(suite):
    result = suite.fail(
        """
def test_it():
    threading.Timer(60, socket.socket().close).start()

def test_other():
    [timer] = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    timer.function()
    timer.cancel()
    timer.join()
"""
    )
    result.assert_outcomes(passed=2)


def test_what_the_loop_of_a_thread_serves_is_left_to_it(suite):
    result = suite.fail(
        """
LOOP, CONNECTED = [], threading.Event()

async def connect():
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    LOOP.append(asyncio.get_running_loop())
    end = asyncio.Event()
    LOOP.append(end)
    CONNECTED.set()
    await end.wait()
    writer.close()
    server.close()

def test_it():
    LOOP.append(threading.Thread(target=lambda: asyncio.run(connect())))
    LOOP[0].start()
    assert CONNECTED.wait(60)

def test_other():
    thread, loop, end = LOOP
    loop.call_soon_threadsafe(end.set)
    thread.join()
"""
    )
    result.assert_outcomes(passed=2)


@pytest.mark.parametrize("library", ["asyncio", "uvloop"])
@pytest.mark.parametrize("use", ["sleep_and_close()", "serve()", "receive()"])
def test_what_the_loop_in_a_fixtures_thread_uses_is_left_to_it(suite, library, use):
    pytest.importorskip(library)
    source = f"""
import {library}

THEIRS, DONE = [], threading.Semaphore(0)

@pytest.fixture(scope="module")
def loop():
    loop = {library}.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="loop-thread")
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()

def pair():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    THEIRS.append(theirs)
    return ours

async def sleep_and_close():
    _, writer = await asyncio.open_connection(sock=pair())
    await asyncio.sleep(1)
    writer.close()
    await writer.wait_closed()
    DONE.release()

async def serve():
    class Protocol(asyncio.Protocol):
        def connection_lost(self, error):
            DONE.release()

    await asyncio.get_running_loop().create_connection(Protocol, sock=pair())

async def receive():
    ours = pair()
    await asyncio.get_running_loop().sock_recv(ours, 1)
    ours.close()
    DONE.release()

def test_it(loop):
    asyncio.run_coroutine_threadsafe({use}, loop)
    while not THEIRS:
        time.sleep(0.01)
    threading.Timer(1, THEIRS[0].close).start()

def test_ends(loop):
    assert DONE.acquire(timeout=60)
"""
    suite.fail(source, apart=True).assert_outcomes(passed=2)


def test_what_a_wider_fixtures_loop_has_yet_to_close_is_left_to_it(suite):
    result = suite.fail(
        WIDER_LOOP
        + """
async def start():
    left, right = socket.socketpair()
    _, writer = await asyncio.open_connection(sock=left)
    async def close():
        await asyncio.sleep(0.3)
        writer.close()
        right.close()
    return asyncio.ensure_future(close())

def test_it(loop): loop.task = loop.run_until_complete(start())
def test_other(loop): loop.run_until_complete(loop.task)
"""
    )
    result.assert_outcomes(passed=2)


def test_what_a_wider_fixtures_loop_will_never_close_fails_the_test(suite):
    result = suite.fail(
        WIDER_LOOP
        + """
async def connect():
    left, right = socket.socketpair()
    keep(await asyncio.open_connection(sock=left))
    right.close()

def test_it(loop): loop.run_until_complete(connect())
def test_other(loop): loop.run_until_complete(asyncio.sleep(0))
""",
        apart=True,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of *test_it _*", "leaked 1 socket *"])


def test_what_one_of_many_threads_holds_is_found_behind_what_all_of_them_share(suite):
    source = """
SHARED = [[number] for number in range(10_000)]
ENDS = threading.Barrier(61)
END = threading.Event()

def work(shared, things):
    ENDS.wait(60)
    END.wait(60)

class Client:
    def __init__(self, sock):
        self.sock = sock

def test_it():
    things = [Client(socket.socket())]
    for number in range(60):
        kept = {"client": things} if number == 40 else None
        threading.Thread(target=work, args=(SHARED, kept), daemon=True).start()
    ENDS.wait(60)

def test_other(): pass
"""
    suite.fail(source, apart=True).assert_outcomes(passed=2)


@pytest.mark.skipif(not shows_other_threads(), reason="variables of other threads cannot be read")
def test_a_search_in_the_variables_of_threads_keeps_none_of_them():
    class Thing:
        pass

    found, seen, end = [], threading.Event(), threading.Event()

    def work():
        thing = Thing()
        found.append(weakref.ref(thing))
        seen.set()
        end.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert seen.wait(60)
    gc.disable()
    try:
        assert id(found[0]()) in threads.running_locals().by_identity
        end.set()
        thread.join()
        # A thread has ended a moment before its variables go.
        deadline = time.monotonic() + 10
        while found[0]() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert found[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [(), ("-n1", "-p", "xdist")], ids=["alone", "xdist"])
def test_what_a_fixtures_thread_keeps_is_an_error_with_the_id_of_the_test_that_used_it_last(
    suite, options
):
    result = suite.fail(
        """
def hold(sock, end=threading.Event()):
    end.wait(60)
    keep(sock)

@pytest.fixture(scope="class")
def server():
    threading.Thread(
        target=hold, args=(socket.create_server(("127.0.0.1", 0)),), name="holder"
    ).start()
    yield

class TestIt:
    def test_first(self, server): pass
    def test_second(self, server): pass

def test_last():
    [thread] = [each for each in threading.enumerate() if each.name == "holder"]
    hold.__defaults__[0].set()
    thread.join()
""",
        "-rE",
        *options,
        apart=bool(options),
    )
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["ERROR test_it.py::TestIt::test_second - *fixture 'server'*"])
