"""A socket that a library opens in a task of its own names the line of the program that waits.

The child tasks below have no line of the program: each runs a function of a library.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import re
import socket
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path

import anyio
import pytest
import trio
import trio.lowlevel
import urllib3
import uvloop

import closewait_guard as cwg
from closewait_guard._capture import awaiting
from closewait_guard._inspect.records import kind_of

made = []


def library_function(code):
    names = {"asyncio": asyncio, "socket": socket, "made": made}
    exec(compile(code, "/venv/site-packages/library.py", "exec"), names)
    return names.popitem()[1]


connect = library_function("""
async def connect(address):
    await asyncio.sleep(0)
    made.append(socket.create_connection(address))
""")


@pytest.fixture(autouse=True)
def all_are_closed():
    yield
    while made:
        made.pop().close()


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


def opened(guard):
    """The record of the newest socket that connects."""
    report = guard.scan(full=True)
    seen = [*report.observations, *(leak.observation for leak in report.findings)]
    records = [each.record for each in seen if each.record.origin is cwg.Origin.CREATED]
    return max(records, key=lambda record: record.serial, default=None)


def lines_of_program(record):
    return [frame.function for frame in record.stack if frame.filename == __file__]


async def in_group(connecting, guard):
    async with asyncio.TaskGroup() as group:
        group.create_task(connecting)
    return opened(guard)


async def in_gather(connecting, guard):
    await asyncio.gather(asyncio.sleep(0), connecting)
    return opened(guard)


async def in_wait(connecting, guard):
    await asyncio.wait([asyncio.ensure_future(connecting)])
    return opened(guard)


async def in_wait_for(connecting, guard):
    await asyncio.wait_for(connecting, 60)
    return opened(guard)


async def in_shield(connecting, guard):
    await asyncio.shield(connecting)
    return opened(guard)


async def in_completed(connecting, guard):
    for first in asyncio.as_completed([connecting]):
        await first
    return opened(guard)


async def in_task(connecting, guard):
    await asyncio.create_task(connecting)
    return opened(guard)


WAYS = [in_group, in_gather, in_wait, in_wait_for, in_shield, in_completed, in_task]


@pytest.mark.parametrize("way", WAYS)
def test_a_library_s_task_names_the_line_that_waits_for_it(guard, address, way):
    record = asyncio.run(way(connect(address), guard))
    assert record.site.function == way.__name__
    assert record.site.filename == __file__
    text = Path(__file__).read_text(encoding="utf-8").splitlines()[record.site.lineno - 1]
    assert record.site.source == text.strip()
    assert record.task is not None


@pytest.mark.parametrize("way", WAYS)
def test_tasks_within_tasks_of_a_library_lead_to_the_line_that_waits_for_all(guard, address, way):
    connecting = connect(address)
    nested = asyncio.wait_for(asyncio.wait_for(asyncio.wait_for(connecting, 60), 60), 60)
    record = asyncio.run(way(nested, guard))
    assert record.site.function == way.__name__


def test_happy_eyeballs_name_the_line_that_connects(guard, address):
    async def resolve(*_, **__):
        # The first two refuse.
        tcp = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*tcp, ("127.0.0.1", port)) for port in (1, 1, address[1])]

    async def open_and_close():
        asyncio.get_running_loop().getaddrinfo = resolve
        _, writer = await asyncio.open_connection("x.test", 80, happy_eyeballs_delay=10)
        record = opened(guard)
        writer.close()
        await writer.wait_closed()
        return record

    record = asyncio.run(open_and_close())
    assert record.site.function.endswith(".open_and_close")


def test_anyio_names_the_line_that_connects(guard, address):
    async def open_and_close():
        async with await anyio.connect_tcp("localhost", address[1]):
            return opened(guard)

    record = anyio.run(open_and_close)
    assert record.site.function.endswith(".open_and_close")


async def opened_by_trio(guard, address):
    async with await trio.open_tcp_stream(*address):
        return opened(guard)


def test_trio_names_the_line_that_connects(guard, address):
    record = trio.run(opened_by_trio, guard, address)
    assert record.site.function == "opened_by_trio"
    assert record.task.endswith("attempt_connect")


def test_a_task_of_trio_without_a_line_names_that_of_the_nursery_it_runs_in(guard, address):
    async def opened_in_nursery():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(library_task, address)
            await trio.lowlevel.checkpoint()
            while not made:
                await trio.lowlevel.checkpoint()
            return opened(guard)

    assert trio.run(opened_in_nursery).site.function.endswith(".opened_in_nursery")


library_task = library_function("""
async def connect(address):
    made.append(socket.create_connection(address))
""")


def test_what_trio_was_run_for_names_the_line_that_ran_it(guard, address):
    trio.run(library_task, address)
    assert opened(guard).site.function == "test_what_trio_was_run_for_names_the_line_that_ran_it"


def test_a_socket_outside_of_tasks_has_none_where_both_libraries_are_loaded(guard):
    with socket.socket():
        record = opened(guard)
    assert record.task is None
    assert not any(frame.is_awaiting for frame in record.stack)


def test_sockets_in_tasks_of_uvloop_name_the_line_that_waits(guard, address):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(in_gather(connect(address), guard)).site.function == "in_gather"
        runner.run(asyncio.wait_for(connect(address), 60))
    assert opened(guard).site.function.startswith("test_sockets_in_tasks_of_uvloop")


connect_in_c = library_function("""
async def connect(address):
    loop = asyncio.get_running_loop()
    made.append((await loop.create_connection(asyncio.Protocol, *address))[0])
""")


def native(guard):
    report = guard.scan(full=True)
    seen = [*report.observations, *(leak.observation for leak in report.findings)]
    return [each.record for each in seen if each.record.origin is cwg.Origin.NATIVE]


@pytest.mark.parametrize("way", [in_group, in_gather, in_wait_for])
def test_a_native_socket_in_a_library_s_task_names_the_line_that_waits_for_it(guard, address, way):
    guard.attribute("uvloop")

    async def main():
        await way(connect_in_c(address), guard)
        made.pop().close()
        return native(guard)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        [record] = runner.run(main())
    assert record.site.function == way.__name__
    # Since Python 3.12, wait_for() makes no task.
    is_in_task = way is not in_wait_for or sys.version_info < (3, 12)
    assert record.site.is_awaiting == is_in_task
    assert record.task.startswith("Task-")


def test_a_question_of_code_in_c_takes_no_native_socket_s_line_away(guard, address):
    guard.attribute("uvloop")
    connect_and_ask = library_function("""
class Asking(asyncio.Protocol):
    def connection_made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

async def connect(address):
    loop = asyncio.get_running_loop()
    made.append((await loop.create_connection(asyncio.Protocol, *address))[0])
    made.append((await loop.create_connection(Asking, *address))[0])
    made[0].get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
""")

    async def main():
        await in_gather(connect_and_ask(address), guard)
        assert [record.site.function for record in native(guard)] == ["in_gather"] * 2
        while made:
            made.pop().close()

    # Without a call of asyncio's between the task and the line that runs the loop.
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def test_a_native_socket_in_a_background_task_has_no_line_of_the_program(guard, address):
    guard.attribute("uvloop")

    async def main():
        task = asyncio.create_task(connect_in_c(address))
        while not task.done():
            await asyncio.sleep(0.001)
        [record] = native(guard)
        assert lines_of_program(record) == []
        made.pop().close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_what_the_loop_was_started_for_names_the_line_that_started_it(guard, address):
    asyncio.run(asyncio.wait_for(connect(address), 60))
    record = opened(guard)
    assert (
        record.site.function == "test_what_the_loop_was_started_for_names_the_line_that_started_it"
    )
    assert record.site.is_awaiting


def test_a_task_with_a_line_of_the_program_keeps_its_own_calls(guard, address):
    async def call():
        await connect(address)

    async def main():
        await asyncio.create_task(call())

    asyncio.run(main())
    record = opened(guard)
    assert record.site.function.endswith(".call")
    assert not any(frame.is_awaiting for frame in record.stack)


def test_what_generators_of_the_program_run_has_their_line(guard, address):
    open_in_turn = library_function("""
def open_in_turn(address):
    made.append(socket.create_connection(address))
    yield
""")

    def call():
        next(open_in_turn(address))

    @asynccontextmanager
    async def connected():
        await connect(address)
        yield

    async def main():
        async with connected():
            assert opened(guard).site.function.endswith(".connected")
            assert not opened(guard).site.is_awaiting
        call()
        assert opened(guard).site.function.endswith(".call")
        assert not opened(guard).site.is_awaiting

    asyncio.run(main())


async def without_a_waiting_task(guard, address):
    task = asyncio.create_task(connect(address))
    while not task.done():
        await asyncio.sleep(0.001)
    return opened(guard)


def test_a_background_task_has_no_line_of_the_program_and_not_the_loop_s_caller(guard, address):
    record = asyncio.run(without_a_waiting_task(guard, address))
    assert lines_of_program(record) == []
    assert record.site.kind is not cwg.FrameKind.USER


def test_the_report_says_that_a_background_task_has_no_line(guard):
    with socket.create_server(("127.0.0.1", 0)) as server:
        asyncio.run(without_a_waiting_task(guard, server.getsockname()))
        server.accept()[0].close()
        text = cwg.render_text(guard.scan(), everything=True)
    assert "in a background task of " in text
    assert "test_awaiting.py" not in text


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, ThreadPool])
def test_the_report_says_that_what_a_thread_was_given_has_no_line(guard, kind):
    with socket.create_server(("127.0.0.1", 0)) as server, kind(1) as pool:
        connection = http.client.HTTPConnection(*server.getsockname())
        list(pool.map(http.client.HTTPConnection.connect, [connection]))
        server.accept()[0].close()
        text = " ".join(cwg.render_text(guard.scan(), everything=True).split())
        connection.close()
    assert " opened in a thread with no line of your code on the stack at " in text
    assert " in HTTPConnection.connect() " in text
    assert " in Thread" not in text


def test_the_report_says_that_a_thread_of_a_library_has_no_line_and_shows_the_librarys(guard):
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        address = server.getsockname()
        sock = pool.submit(urllib3.util.connection.create_connection, address).result()
        server.accept()[0].close()
        text = " ".join(cwg.render_text(guard.scan(), everything=True).split())
        sock.close()
    shown = r" opened in a thread with no line of your code on the stack at \S+connection\.py:\d+ "
    assert re.search(shown, text), text


def test_the_report_says_which_line_awaits_the_task(guard):
    with socket.create_server(("127.0.0.1", 0)) as server:
        asyncio.run(in_gather(connect(server.getsockname()), guard))
        server.accept()[0].close()
        text = cwg.render_text(guard.scan(), everything=True)
    opened_in, awaited_from = text.index(" in a task, "), text.index(" awaited from ")
    assert opened_in < awaited_from < text.index(" in in_gather()")
    assert "        await asyncio.gather(" in text


def test_a_callback_that_cancels_another_task_does_not_wait_for_this_one(guard, address):
    async def other():
        await asyncio.sleep(3600)

    async def main():
        task = asyncio.create_task(connect(address))
        innocent = asyncio.create_task(other())
        task.add_done_callback(lambda _: innocent.cancel())
        task.add_done_callback(innocent.cancel)
        while not task.done():
            await asyncio.sleep(0.001)
        return opened(guard)

    assert lines_of_program(asyncio.run(main())) == []


def test_siblings_in_a_gather_are_no_waiting_tasks(guard, address):
    async def sibling():
        await asyncio.sleep(0.05)

    async def main():
        await asyncio.gather(sibling(), connect(address), sibling())
        return opened(guard)

    assert lines_of_program(asyncio.run(main()))[0].endswith(".main")


def test_neither_tasks_nor_coroutines_nor_their_variables_are_kept_alive(guard, address):
    class Value:
        pass

    async def main():
        value = Value()
        await asyncio.gather(connect(address))
        return weakref.ref(asyncio.current_task()), weakref.ref(value)

    references = asyncio.run(main())
    assert lines_of_program(opened(guard))
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_search_that_fails_is_no_failure_of_the_program(guard, address, monkeypatch):
    def fail(_):
        raise RuntimeError("no such attribute")

    monkeypatch.setattr(awaiting, "suspended_frames", fail)
    record = asyncio.run(in_gather(connect(address), guard))
    assert lines_of_program(record) == []
    assert guard.scan().coverage.failures == 0


@pytest.mark.parametrize(("length", "found"), [(3, 1), (500, 0)])
def test_a_long_line_of_callbacks_is_not_followed_to_its_end(guard, address, length, found):
    def pass_on(last):
        new = asyncio.get_running_loop().create_future()
        last.add_done_callback(lambda _: new.set_result(None))
        return new

    async def main():
        future = asyncio.create_task(connect(address))
        for _ in range(length):
            future = pass_on(future)
        await future
        return opened(guard)

    assert len(lines_of_program(asyncio.run(main()))) == found


def test_what_starts_an_installed_program_is_no_line_of_the_program(tmp_path, monkeypatch):
    script = tmp_path / "bin" / "serve"
    script.parent.mkdir()
    script.write_text(
        "#!/usr/bin/python3\nimport sys\nfrom package import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    own = tmp_path / "bin" / "own"
    own.write_text("import socket\nkept = socket.socket()\n")
    assert kind_of(str(script)) is cwg.FrameKind.LIBRARY
    assert kind_of("C:\\venv\\Scripts\\serve.exe\\__main__.py") is cwg.FrameKind.LIBRARY
    assert kind_of(str(own)) is cwg.FrameKind.USER
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    assert kind_of("<string>") is cwg.FrameKind.LIBRARY
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    assert kind_of("<string>") is cwg.FrameKind.USER


def test_a_program_that_is_given_on_the_command_line_has_its_line():
    code = (
        "import socket; import closewait_guard as cwg; cwg.install(); s = socket.socket();"
        "print(cwg.scan(full=True).observations[0].record.site.place)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "<string>:1\n"
