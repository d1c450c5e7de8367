"""no_leaks() fails the block that leaks, and only that; it masks and delays nothing else."""

from __future__ import annotations

import asyncio
import gc
import inspect
import socket
import threading
import time
import traceback
import unittest

import pytest

import closewait_guard as cwg
from closewait_guard.testing import connected_pair, half_closed_pair


def test_a_clean_block_passes_at_once_without_a_collection():
    collections = []
    gc.callbacks.append(lambda phase, info: collections.append(info["generation"] == 2))
    guard = cwg.Guard().install()
    started = time.monotonic()
    try:
        with guard.no_leaks(grace=30):
            with connected_pair():
                pass
    finally:
        gc.callbacks.pop()
        guard.uninstall()
    assert time.monotonic() - started < 5
    assert not any(collections)


@pytest.mark.parametrize("depth", [0, 32])
def test_a_socket_left_open_fails_with_the_rendered_report(depth):
    kept = []
    with pytest.raises(cwg.SocketLeakError) as caught:
        with cwg.Guard(cwg.Settings(stack_depth=depth)) as guard, guard.no_leaks(grace=0.05):
            kept.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    kept[0].close()
    assert isinstance(caught.value, AssertionError)
    assert str(caught.value) == cwg.render_text(caught.value.report)
    [leak] = caught.value.report.findings
    assert leak.verdict is cwg.Verdict.OPEN
    assert "1 socket still open." in str(caught.value)
    assert "No leaks" not in str(caught.value)
    assert ("kept.append(socket.socket(" in str(caught.value)) == bool(depth)


@pytest.mark.parametrize(
    ("peer_closes", "verdict"), [(True, cwg.Verdict.LEAKED), (False, cwg.Verdict.OPEN)]
)
def test_a_connection_left_open_has_the_verdict_of_its_state(peer_closes, verdict):
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(cwg.SocketLeakError) as caught, cwg.no_leaks(grace=0.05):
            ours = socket.create_connection(server.getsockname())
            theirs, _ = server.accept()
            if peer_closes:
                theirs.close()
        ours.close()
        theirs.close()
    assert verdict in [leak.verdict for leak in caught.value.report.findings]


def test_sockets_that_were_open_before_do_not_count():
    with half_closed_pair(), socket.socket(), cwg.no_leaks(grace=0):
        socket.socket().close()
    with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair():
        with guard.no_leaks(grace=0):
            pass
        assert guard.scan().leaks


def test_allow_open_accepts_a_healthy_connection_and_no_other():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with cwg.no_leaks(grace=0.05, allow_open=True):
            pooled = socket.create_connection(server.getsockname())
            theirs, _ = server.accept()
        with pytest.raises(cwg.SocketLeakError):
            with cwg.no_leaks(grace=0.05, allow_open=True):
                leaked = socket.create_connection(server.getsockname())
                server.accept()[0].close()
        for sock in (pooled, theirs, leaked):
            sock.close()


def test_a_socket_that_is_about_to_close_is_waited_for():
    with cwg.no_leaks(grace=10):
        sock = socket.socket()
        timer = threading.Timer(0.2, sock.close)
        timer.start()
    timer.join()


def test_a_socket_dropped_inside_fails_though_it_is_gone():
    with pytest.warns(ResourceWarning), pytest.raises(cwg.SocketLeakError, match="DROPPED"):
        with cwg.no_leaks(grace=10):
            socket.socket()


def test_a_socket_alive_until_collected_is_reported_as_a_cycle():
    started = time.monotonic()
    with pytest.warns(ResourceWarning), pytest.raises(cwg.SocketLeakError, match="reference cycle"):
        with cwg.no_leaks(grace=30):
            cycle = [socket.socket()]
            cycle.append(cycle)
            del cycle
    assert time.monotonic() - started < 10, "nothing is left to wait for"


def test_an_exception_from_the_block_is_never_masked():
    kept = []
    for error in (ValueError("mine"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught, cwg.no_leaks(grace=10):
            kept.append(socket.socket())
            raise error
        assert caught.value is error
        assert not hasattr(error, "__notes__")
    for sock in kept:
        sock.close()


def test_it_decorates_functions():
    kept = []

    @cwg.no_leaks(grace=0.05)
    def work(number, *, leak=False):
        """Work."""
        if leak:
            kept.append(socket.socket())
        return number + 1

    assert work(1) == 2
    assert (work.__name__, work.__doc__) == ("work", "Work.")
    for _ in range(2):
        with pytest.raises(cwg.SocketLeakError):
            work(1, leak=True)
    assert work(2) == 3
    for sock in kept:
        sock.close()


def test_it_decorates_coroutine_functions_and_lets_the_loop_close():
    async def handle(reader, writer):
        await reader.read()
        writer.close()

    @cwg.no_leaks(grace=10)
    async def clean():
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.close()
        server.close()
        return "done"

    @cwg.no_leaks(grace=0.05)
    async def leaky(kept):
        kept.append(await asyncio.open_connection(*address))

    async def main():
        nonlocal address
        assert await clean() == "done"
        kept = []
        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            address = server.sockets[0].getsockname()
            with pytest.raises(cwg.SocketLeakError, match="task main-task"):
                await leaky(kept)
            kept[0][1].close()
            await kept[0][1].wait_closed()

    async def named():
        return await asyncio.create_task(main(), name="main-task")

    address = None
    asyncio.run(named())
    assert inspect.iscoroutinefunction(clean)


def test_async_with_waits_without_blocking_the_loop():
    async def main():
        async with cwg.no_leaks(grace=10):
            sock = socket.socket()
            asyncio.get_running_loop().call_later(0.1, sock.close)

    asyncio.run(main())


def test_async_with_masks_no_exception():
    async def main():
        async with cwg.no_leaks():
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(main())


def test_nested_blocks_fail_each_for_its_own_sockets():
    with cwg.Guard() as guard:
        with pytest.raises(cwg.SocketLeakError) as outer, guard.no_leaks(grace=0.05):
            first = socket.socket()
            with pytest.raises(cwg.SocketLeakError) as inner, guard.no_leaks(grace=0.05):
                second = socket.socket()
        first.close()
        second.close()
    assert len(inner.value.report.findings) == 1
    assert len(outer.value.report.findings) == 2


def test_it_misses_nothing_while_another_thread_scans(monkeypatch):
    failures = []
    with cwg.Guard() as guard:
        stop = threading.Event()

        def scan():
            try:
                while not stop.is_set():
                    guard.scan()
            except BaseException:
                failures.append(f"the other thread: {traceback.format_exc()}")

        thread = threading.Thread(target=scan)
        thread.start()
        try:
            for number in range(200):
                failures += failures_to_find(guard, number, monkeypatch)
                if failures:
                    break
        finally:
            stop.set()
            thread.join()
        coverage = guard.scan().coverage
    assert not failures, "\n".join([*failures, str(coverage)])


def failures_to_find(guard, number, monkeypatch):
    """What went wrong with a block that leaks one socket; with all that was seen, to tell why."""
    kept, scans, open_since = [], [], guard._open_since

    def record(mark):
        scans.append((mark, open_since(mark)))
        return scans[-1][1]

    try:
        with monkeypatch.context() as patch, guard.no_leaks(grace=0):
            patch.setattr(guard, "_open_since", record)
            kept.append(socket.socket())
    except cwg.SocketLeakError as error:
        found = [finding.observation.fd for finding in error.report.findings]
        if kept[0].fileno() not in found:
            return [f"block {number} failed, without {kept}: {error}"]
    except Exception:
        return [f"block {number}: {traceback.format_exc()}"]
    else:
        recorded = guard._open_creations(0)
        return [f"block {number} passed with {kept}; scans: {scans}; recorded: {recorded}"]
    finally:
        for sock in kept:
            sock.close()
    return []


def test_it_uses_the_installed_guard_and_leaves_it_installed():
    guard = cwg.install(context=lambda: {"who": "me"})
    try:
        kept = []
        with pytest.raises(cwg.SocketLeakError, match="who=me"), cwg.no_leaks(grace=0):
            kept.append(socket.socket())
        kept[0].close()
        assert guard.installed
    finally:
        cwg.uninstall()


def test_it_works_in_unittest():
    class Case(unittest.TestCase):
        def test(self):
            self.enterContext(cwg.no_leaks(grace=0))
            kept.append(socket.socket())

    kept = []
    result = unittest.TestResult()
    Case("test").run(result)
    kept[0].close()
    assert len(result.failures) == 1
    assert "kept.append(socket.socket())" in result.failures[0][1]


@pytest.mark.parametrize("grace", [-1, "soon", None, True, float("nan")])
def test_a_bad_grace_is_refused_in_one_sentence(grace):
    with pytest.raises(
        cwg.ConfigurationError, match=r"no_leaks\(grace=...\): expected a non-negative"
    ):
        cwg.no_leaks(grace)


def test_a_decorator_without_parentheses_is_refused_in_one_sentence_by_function_and_guard():
    sentence = r"^no_leaks needs parentheses as a decorator: @no_leaks\(\)$"
    for decorator in (cwg.no_leaks, cwg.Guard().no_leaks):
        with pytest.raises(cwg.ConfigurationError, match=sentence):
            decorator(socket.socket)


def test_a_block_in_which_recording_has_failed_does_not_pass():
    with cwg.Guard() as guard:
        guard._registry.on_error()
        with guard.no_leaks():
            socket.socket().close()
        with pytest.raises(cwg.SocketLeakError) as caught, guard.no_leaks(allow_open=True):
            guard._registry.on_error()
        with guard.no_leaks():
            socket.socket().close()
    said = (
        "Whether the block has left sockets open is unknown: recording sockets has failed (1 time)."
    )
    assert " ".join(str(caught.value).split()) == said
    assert caught.value.report.findings == ()


def test_a_block_of_whose_dropped_sockets_no_record_is_left_does_not_pass():
    with cwg.Guard(cwg.Settings(dropped_kept=0)) as guard:
        with pytest.warns(ResourceWarning), pytest.raises(cwg.SocketLeakError) as caught:
            with guard.no_leaks():
                socket.socket()
        with guard.no_leaks():
            socket.socket().close()
    said = "unknown: no record is left of 1 dropped socket."
    assert said in " ".join(str(caught.value).split())


def test_the_error_of_a_block_says_that_more_may_be_open_than_it_lists():
    kept = []
    with cwg.Guard() as guard:
        with pytest.raises(cwg.SocketLeakError) as caught, guard.no_leaks(grace=0):
            guard._registry.on_error()
            kept.append(socket.socket())
    kept.pop().close()
    text = str(caught.value)
    assert text.startswith("Whether the block has left more sockets open is unknown: recording")
    assert "1 leaked socket from 1 place." in text


async def open_stream(server):
    return await asyncio.open_connection(*server.getsockname())


def test_a_stream_writer_that_closes_itself_is_warned_of_by_asyncio_and_no_finding():
    async def main():
        with pytest.warns(ResourceWarning, match="unclosed <StreamWriter"):
            async with cwg.no_leaks():
                await open_stream(server)

    with socket.create_server(("127.0.0.1", 0)) as server:
        asyncio.run(main())


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_stream_writer_that_outlives_its_loop_was_dropped_with_its_line():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(cwg.SocketLeakError) as caught, cwg.no_leaks(grace=0.05):
            loop = asyncio.new_event_loop()
            streams = loop.run_until_complete(open_stream(server))
            loop.close()
            del streams
    [leak] = caught.value.report.findings
    assert leak.verdict is cwg.Verdict.DROPPED
    assert leak.observation.record.site.function == "open_stream"
