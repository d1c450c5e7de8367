"""Event loops, TLS and green threads: what leaks through each is found, and named."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import asynccontextmanager

import aiohttp
import aiohttp.web
import anyio
import httpx
import pytest
import requests
import trio
import uvicorn
import uvloop
import websockets.asyncio.client
import websockets.asyncio.server
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

import closewait_guard as cwg
from findings import findings_of, findings_of_async
from servers import authority, web

# Leaving sockets behind is what this is about.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


async def reported_meanwhile(guard, sleep, wanted=lambda _: True):
    """The finding that is wanted, in any event loop."""
    for _ in range(2000):
        for leak in guard.scan().findings:
            if leak.verdict is cwg.Verdict.LEAKED and wanted(leak):
                return leak
        await sleep(0.03)
    raise AssertionError(cwg.render_text(guard.scan(full=True)))


def test_trio_names_the_stream_and_its_task(guard):
    async def hold(port, opened):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(b"GET /partial HTTP/1.1\r\nHost: x\r\n\r\n")
        opened.set()
        await trio.sleep_forever()

    async def main(port):
        opened = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold, port, opened, name="holder-1")
            await opened.wait()
            leak = await reported_meanwhile(guard, trio.sleep)
            # trio connects in tasks of its own, for this line.
            assert leak.observation.record.site.function.endswith(".hold")
            assert leak.holders[0].startswith("task 'holder-1' suspended at ")
            assert "'stream' of" in leak.holders[0]
            assert "await stream.aclose()" in leak.hint
            nursery.cancel_scope.cancel()

    with web() as server:
        trio.run(main, server.port)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_anyio_streams_are_named_with_their_holder(guard, backend):
    async def main(port):
        mine = await anyio.connect_tcp("127.0.0.1", port)
        await mine.send(b"GET /partial HTTP/1.1\r\nHost: x\r\n\r\n")
        leak = await reported_meanwhile(guard, anyio.sleep)
        assert leak.observation.record.site.function.endswith(".main")
        assert any("'mine' of" in holder for holder in leak.holders)
        await mine.aclose()

    with web() as server:
        anyio.run(main, server.port, backend=backend)
    assert guard.scan().leaks == ()


def test_a_websocket_never_closed_is_held_and_a_closing_handshake_is_no_leak(guard):
    async def main():
        async def hang_up(connection):
            await connection.recv()
            connection.transport.abort()

        async def silent(connection):
            await connection.wait_closed()

        async def connect(port):
            return await websockets.asyncio.client.connect(f"ws://127.0.0.1:{port}")

        async with websockets.asyncio.server.serve(silent, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            # On a busy machine it may take longer than the grace time of the other guard.
            with cwg.Guard(cwg.Settings(grace=60)) as patient:
                mine = await connect(port)
                closing = asyncio.create_task(mine.close())
                while not closing.done():
                    assert patient.scan().leaks == ()
                    await asyncio.sleep(0)
            mine = await connect(port)
            mine.transport.pause_reading()
            for connection in list(server.connections):
                connection.transport.write_eof()
            leak = await reported_meanwhile(
                guard, asyncio.sleep, lambda leak: leak.observation.record.origin == "created"
            )
            assert leak.observation.record.site.function.endswith("connect")
            assert any("'mine' of" in holder for holder in leak.holders)
            assert "`await websocket.close()`" in leak.hint
            mine.transport.abort()

    asyncio.run(main())


def test_requests_and_httpx_over_tls_are_blamed_on_the_programs_line(guard, tmp_path):
    theirs, ours, certificate = authority()
    (tmp_path / "ca.pem").write_bytes(certificate)

    def with_requests(url):
        session = requests.Session()
        return session, session.get(url, stream=True, verify=tmp_path / "ca.pem")

    def with_httpx(url):
        client = httpx.Client(verify=ours)
        return client, client.send(client.build_request("GET", url), stream=True)

    with web(theirs) as server:
        for fetch, hint in ((with_requests, "session.get"), (with_httpx, "client.stream")):
            owner, response = fetch(server.url + "/partial")
            [leak] = findings_of(guard, cwg.Verdict.LEAKED)
            assert leak.observation.tls
            assert leak.observation.record.site.function.endswith(fetch.__name__)
            assert any("'response' of" in holder for holder in leak.holders), leak.holders
            assert hint in leak.hint
            response.close()
            owner.close()
    assert guard.scan().leaks == ()


def test_tls_over_asyncio_and_aiohttp_is_seen_through_its_transport(guard):
    theirs, ours, _ = authority()

    async def main(server):
        async def connect():
            return await asyncio.open_connection("localhost", server.port, ssl=ours)

        _, mine = await connect()
        mine.write(b"GET /partial HTTP/1.1\r\nHost: x\r\n\r\n")
        mine.transport.pause_reading()
        leaks = await findings_of_async(guard, cwg.Verdict.LEAKED)
        assert leaks[0].observation.record.site.function.endswith("connect")
        assert "main(): " in leaks[0].holders[0]
        assert "writer.close()" in leaks[0].hint
        mine.transport.abort()
        async with aiohttp.ClientSession() as session:
            async with session.get(server.url, ssl=ours) as response:
                await response.read()
        await asyncio.sleep(0.1)
        assert guard.scan().leaks == ()

    with web(theirs) as server:
        asyncio.run(main(server))


def test_wrapping_before_the_connect_and_unwrapping(guard):
    theirs, ours, _ = authority()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with theirs.wrap_socket(server.accept()[0], server_side=True) as peer:
                with peer.unwrap():
                    pass

        thread = threading.Thread(target=serve)
        thread.start()

        def connect():
            sock = ours.wrap_socket(socket.socket(), server_hostname="localhost")
            sock.connect(server.getsockname())
            return sock

        wrapped = connect()
        plain = wrapped.unwrap()
        thread.join()
        [leak] = findings_of(guard, cwg.Verdict.LEAKED)
        assert leak.observation.record.site.function.endswith("connect")
        plain.close()


def run(code):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


GREEN = """
    import sys, time
    {first}
    {second}
    import socket
    import closewait_guard as cwg
    guard = cwg.install(grace=0)

    def connect():
        server = socket.create_server(("127.0.0.1", 0))
        mine = socket.create_connection(server.getsockname())
        server.accept()[0].close()
        server.close()
        return mine

    kept = {{"mine": connect()}}
    end = time.monotonic() + 60
    leaks = ()
    while not leaks and time.monotonic() < end:
        leaks = guard.scan().leaks
        time.sleep(0.02)
    [leak] = leaks
    report = guard.scan()
    text = cwg.render_text(report)
    assert leak.verdict == "leaked", text
    assert leak.observation.record.origin == "created", text
    assert leak.observation.record.site.function == "connect", text
    assert "taken the place" not in text, text
    kept["mine"].close()
    assert guard.scan(full=True).leaks == ()
"""
PATCHES = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}
INSTALL = "import closewait_guard; closewait_guard.install(grace=0)"


@pytest.mark.parametrize("library", PATCHES)
@pytest.mark.parametrize("guard_first", [True, False])
def test_green_sockets_are_found_in_any_order(library, guard_first):
    patch = PATCHES[library]
    first, second = (INSTALL, patch) if guard_first else (patch, INSTALL)
    run(GREEN.format(first=first, second=second))


GEVENT_ORDERS = pytest.mark.parametrize(
    "prepared",
    [
        f"{INSTALL}\n{PATCHES['gevent']}",
        f"{PATCHES['gevent']}\n{INSTALL}",
        f"import gevent.server, gevent.ssl\n{INSTALL}\n{PATCHES['gevent']}",
    ],
    ids=["guard first", "guard last", "guard between import and patch"],
)


def run_with_gevent(prepared, code):
    run(f"{prepared}\n{textwrap.dedent(code)}")


@GEVENT_ORDERS
def test_sockets_of_gevent_s_own_class_name_the_line_that_opened_them(prepared):
    run_with_gevent(
        prepared,
        """
        import gevent, gevent.server, socket, sys
        import closewait_guard as cwg
        guard = cwg.install(grace=0)

        def leak_of(record):
            for _ in range(200):
                for leak in guard.scan().leaks:
                    if leak.observation.record.site.function == record:
                        return leak
                gevent.sleep(0.02)
            raise AssertionError(cwg.render_text(guard.scan(full=True)))

        kept = []

        def connect(address):
            kept.append(socket.create_connection(address))

        def accept(listener):
            kept.append(listener.accept()[0])

        def handle(sock, address):
            mine = sock
            gevent.sleep(60)

        # A client, in a greenlet, and one that has accepted.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for closes, keeps in ((1, "connect"), (0, "accept")):
                kept.clear()
                gevent.joinall([gevent.spawn(connect, listener.getsockname())])
                gevent.joinall([gevent.spawn(accept, listener)])
                kept[closes].close()
                leak = leak_of(keeps)
                record = leak.observation.record
                assert record.origin == ("created" if keeps == "connect" else "accepted"), record
                assert record.parent is None or record.parent.site.function == "<module>"
                assert "kept[" in str(leak.holders), leak.holders
                kept.pop().close(), kept.pop().close()

        # A handler of gevent's own server, which never closes.
        server = gevent.server.StreamServer(("127.0.0.1", 0), handle)
        server.start()
        socket.create_connection(server.address).close()
        leak = leak_of("<module>")
        assert leak.observation.record.origin == "accepted", leak
        assert "of handle() in greenlet" in str(leak.holders), leak.holders
        server.stop(timeout=0)

        # A socket that nothing refers to any more.
        def drop():
            socket.socketpair()[0].close()

        drop()
        [dropped] = [each for each in guard.scan().leaks if each.verdict == "dropped"]
        assert dropped.observation.record.site.function == "drop"

        # What was there is back.
        inner = sys.modules["gevent._socket3"]._wrefsocket
        assert {"__init__", "detach", "__del__"} <= vars(inner).keys()
        cwg.uninstall()
        assert not {"__init__", "detach", "__del__"} & vars(inner).keys()
        assert not [each for each in sys.meta_path if "closewait" in type(each).__module__]
        """,
    )


@GEVENT_ORDERS
def test_pools_and_files_of_gevent_s_sockets_are_judged_as_those_of_other_sockets(prepared):
    run_with_gevent(
        prepared,
        """
        import gevent, gevent.pool, gevent.pywsgi, os, requests, socket
        import closewait_guard as cwg
        guard = cwg.install(grace=0)

        def app(environ, start_response):
            start_response("200 OK", [("Content-Length", "2")])
            return [b"ok"]

        handlers = gevent.pool.Pool(10)
        server = gevent.pywsgi.WSGIServer(("127.0.0.1", 0), app, log=None, spawn=handlers)
        server.start()
        url = f"http://127.0.0.1:{server.server_port}/"
        session = requests.Session()

        def fetch():
            assert session.get(url).text == "ok"

        gevent.joinall([gevent.spawn(fetch) for _ in range(3)], raise_error=True)
        assert not guard.scan().leaks, cwg.render_text(guard.scan())
        server.stop(timeout=0)
        for each in guard.scan(full=True).observations:
            assert each.record.origin != "native" and each.record.stack, each
        for _ in range(200):
            found = guard.scan().findings
            if found and all(each.verdict == "stale_pool" for each in found):
                break
            gevent.sleep(0.02)
        else:
            raise AssertionError(cwg.render_text(guard.scan()))
        assert {each.observation.record.site.function for each in found} == {"fetch"}
        session.close()

        a, b = socket.socketpair()
        file = a.makefile("rb")
        a.close()
        b.sendall(b"x")
        assert file.read(1) == b"x"
        file.close(), b.close()
        assert not guard.scan().leaks, cwg.render_text(guard.scan())

        a, b = socket.socketpair()
        number = a.detach()
        b.close()
        [leak] = guard.scan().leaks
        assert leak.observation.record.origin == "detached", leak
        assert leak.observation.record.site.function == "<module>", leak
        os.close(number)
        gevent.sleep(0.1)  # gevent closes when its loop comes to it.
        report = guard.scan()
        assert not report.leaks and not report.coverage.native, cwg.render_text(report)
        assert not guard.scan().coverage.native
        """,
    )


def test_sockets_of_gevent_that_are_older_than_the_guard_are_adopted():
    run(
        """
        from gevent import monkey; monkey.patch_all()
        import socket
        import closewait_guard as cwg
        a, b = socket.socketpair()
        with cwg.install(grace=0) as guard:
            report = guard.scan(full=True)
            assert {each.record.origin for each in report.observations} == {"adopted"}, report
            assert report.coverage.native == 0
        """
    )


def test_sockets_of_gevent_are_found_without_a_guard_and_not_taken_for_those_of_an_extension():
    run(
        """
        from gevent import monkey; monkey.patch_all()
        import socket
        import closewait_guard as cwg
        server = socket.create_server(("127.0.0.1", 0))
        kept = socket.create_connection(server.getsockname())
        server.accept()[0].close()
        report = cwg.Guard(cwg.Settings(grace=0)).scan(full=True)
        [leak] = report.leaks
        assert leak.code == "CWG101", leak
        assert {each.record.origin for each in report.observations} == {"adopted"}, report
        assert report.coverage.native == 0
        [note] = report.coverage.notes
        assert "gevent" not in note
        """
    )


def test_a_suspended_greenlet_is_reported_with_its_variable():
    run(
        """
        import gevent, socket
        import closewait_guard as cwg
        guard = cwg.install(grace=0)

        def hold(address):
            mine = socket.create_connection(address)
            gevent.sleep(60)

        server = socket.create_server(("127.0.0.1", 0))
        task = gevent.spawn(hold, server.getsockname())
        gevent.sleep(0.1)
        server.accept()[0].close()
        gevent.sleep(0.3)
        [leak] = guard.scan().leaks
        assert leak.holders[0].startswith("local 'mine' of hold() in greenlet "), leak.holders
        task.kill()
        """
    )


# More than a server reads ahead for a handler that receives nothing.
FRAMES = (b"\x82\xe4" + bytes(104)) * 100
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def send_frames_and_leave(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(UPGRADE)
        # Read to the end of it: what is left unread would reset the connection.
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += sock.recv(1000)
        sock.sendall(FRAMES)
        time.sleep(0.1)


@asynccontextmanager
async def websockets_server(over):
    def wait(_):
        return over.wait()

    async with websockets.asyncio.server.serve(wait, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        over.set()
        for connection in list(server.connections):
            connection.transport.abort()


@asynccontextmanager
async def aiohttp_server(over):
    async def wait(request):
        websocket = aiohttp.web.WebSocketResponse()
        await websocket.prepare(request)
        request.transport.pause_reading()
        await over.wait()
        request.transport.abort()
        return websocket

    app = aiohttp.web.Application()
    app.router.add_get("/", wait)
    runner = aiohttp.web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    over.set()
    await runner.cleanup()


@asynccontextmanager
async def starlette_server(over):
    async def wait(websocket):
        await websocket.accept()
        await over.wait()

    app = Starlette(routes=[WebSocketRoute("/", wait)])
    config = uvicorn.Config(
        app, port=0, log_level="critical", ws="websockets-sansio", lifespan="off"
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    over.set()
    server.should_exit = server.force_exit = True
    await serving


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("serve", "hint"),
    [
        (websockets_server, "`await websocket.close()`"),
        (aiohttp_server, "`await ws.close()`"),
        (starlette_server, "WebSocketDisconnect"),
    ],
    ids=["websockets", "aiohttp", "starlette"],
)
def test_the_hint_of_an_accepted_websocket_is_for_its_handler(guard, serve, hint, run):
    async def main():
        async with serve(asyncio.Event()) as port:
            await asyncio.to_thread(send_frames_and_leave, port)
            leak = await reported_meanwhile(guard, asyncio.sleep)
            assert hint in leak.hint, leak
            assert "connect(" not in leak.hint

    run(main())
