"""The ways in which Python programs leak sockets, each made on purpose: verdict, line, holder.

See also: pools whose idle connections the server closes, responses never read, a session for
each call, connections never returned: test_pools.py; native owners: test_native_sockets.py; forks:
test_forks.py; numbers closed elsewhere: test_closed_elsewhere.py.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request

import botocore.config
import botocore.session
import pytest

import closewait_guard as cwg
from closewait_guard.testing import connected_pair
from findings import findings_of, findings_of_async, opened_in
from servers import authority, web

# Leaving sockets behind is what this is about.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def only(guard, verdict, site):
    """The one leak of a verdict that was opened in a function of this file."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        leaks = [leak for leak in opened_in(guard.scan().findings, site) if leak.verdict is verdict]
        if leaks:
            [leak] = leaks
            return leak
        time.sleep(0.03)
    raise AssertionError(cwg.render_text(guard.scan(full=True)))


def test_a_client_for_each_call_of_a_library_that_hides_its_close(guard, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    session = botocore.session.Session()
    config = botocore.config.Config(s3={"addressing_style": "path"})
    kept = []

    def call(url):
        client = session.create_client("s3", "us-east-1", endpoint_url=url, config=config)
        kept.append(client)
        client.get_object(Bucket="bucket", Key="key")["Body"].read()

    with web() as server:
        for _ in range(13):
            call(server.url)
        server.hang_up()
        leaks = opened_in(findings_of(guard, cwg.Verdict.LEAKED, 13), "call")
        assert "one of 13 pools for this address" in leaks[0].holders[-1]
        assert any("kept[" in holder for leak in leaks for holder in leak.holders)
        for client in kept:
            client.close()
    assert guard.scan().leaks == ()


def test_an_exception_that_is_kept_keeps_the_connection(guard):
    failures = []

    def fetch(port):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/partial")
        response = connection.getresponse()
        try:
            response.read()
        except http.client.IncompleteRead as error:
            failures.append(error)

    with web() as server:
        fetch(server.port)
        leak = only(guard, cwg.Verdict.LEAKED, "fetch")
        assert "failures[0]" in leak.holders[0]
        assert "kept by an exception's traceback" in leak.holders[0]
        assert "do not keep the exception" in leak.hint
        failures.clear()


def test_a_close_that_is_never_reached_because_the_goodbye_failed(guard):
    def goodbye(sock):
        try:
            sock.shutdown(socket.SHUT_RDWR)
            sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        except OSError:
            pass

    def connect():
        return socket.create_connection(server.getsockname())

    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = connect()
        server.accept()[0].close()
        goodbye(sock)
        leak = only(guard, cwg.Verdict.DEAD, "connect")
        assert "'sock' of" in leak.holders[0]
        assert "call close() in the error path" in leak.hint
        sock.close()


def test_an_answer_that_is_never_asked_for(guard):
    with web() as server:
        connection = http.client.HTTPConnection(*server.url.removeprefix("http://").split(":"))
        connection.request("GET", "/partial")
        leak = only(guard, cwg.Verdict.LEAKED, "test_an_answer_that_is_never_asked_for")
        assert "connection" in leak.holders[0]
        assert "call connection.close()" in leak.hint
        connection.close()


def test_a_close_that_a_response_puts_off(guard):
    def fetch(url):
        return urllib.request.urlopen(url + "/partial")

    with web() as server:
        answer = fetch(server.url)
        leak = only(guard, cwg.Verdict.LINGERING, "fetch")
        assert leak.observation.close_called
        assert leak.holders[0].endswith(": http.client.HTTPResponse"), leak.holders
        assert "'answer' of" in leak.holders[0]
        assert "response.close()" in leak.hint
        answer.close()


def test_a_task_cancelled_in_its_handshake_leaves_its_socket_in_a_list(guard):
    kept = []

    async def handshake(loop, address):
        sock = socket.socket()
        sock.setblocking(False)
        kept.append(sock)
        await loop.sock_connect(sock, address)
        await loop.sock_recv(sock, 100)

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            loop = asyncio.get_running_loop()
            task = asyncio.create_task(handshake(loop, server.getsockname()), name="shake-1")
            peer = await asyncio.to_thread(server.accept)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            peer[0].close()
            leak = await asyncio.to_thread(only, guard, cwg.Verdict.LEAKED, "handshake")
            assert leak.observation.record.task == "shake-1"
            assert any("kept[0]" in holder for holder in leak.holders)
            kept.pop().close()

    asyncio.run(main())
    assert guard.scan().leaks == ()


def test_tls_and_connects_cancelled_within_asyncio_leave_nothing(guard):
    _, ours, _ = authority()

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(
                        asyncio.open_connection(*server.getsockname(), ssl=ours), 0.1
                    )
            await asyncio.sleep(0.2)

    asyncio.run(main())
    assert guard.scan(full=True).leaks == ()


def test_a_failed_handshake_leaves_nothing_but_what_the_program_keeps(guard):
    _, context, _ = authority()

    def connect(address):
        plain = socket.create_connection(address)
        wrapped = context.wrap_socket(
            plain, server_hostname="localhost", do_handshake_on_connect=False
        )
        with pytest.raises((ssl.SSLError, OSError)):
            wrapped.do_handshake()
        return wrapped

    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            peer, _ = server.accept()
            peer.recv(1)
            peer.sendall(b"no TLS here")
            peer.close()

        thread = threading.Thread(target=answer)
        thread.start()
        mine = connect(server.getsockname())
        thread.join()
        end = time.monotonic() + 60
        while not (leaks := opened_in(guard.scan().leaks, "connect")) and time.monotonic() < end:
            time.sleep(0.02)
        [leak] = leaks
        assert leak.observation.tls
        assert "'mine' of" in leak.holders[0]
        mine.close()


def test_a_stuck_handler_is_reported_with_its_thread_and_line():
    stuck = threading.Event()

    def handle(conn):
        with conn:
            conn.recv(100)
            stuck.wait()

    settings = cwg.Settings(grace=0.05, age_warning=0.1)
    with cwg.Guard(settings) as guard, socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        conn, _ = server.accept()
        thread = threading.Thread(target=handle, args=(conn,), name="handler-1")
        del conn
        thread.start()
        client.sendall(b"request")
        client.close()
        leak = only(guard, cwg.Verdict.LEAKED, "reported_with_its_thread_and_line")
        assert leak.observation.record.origin is cwg.Origin.ACCEPTED
        assert any("handle() in thread handler-1, now at" in text for text in leak.holders)
        assert leak.code == "CWG111"
        assert "let the call that holds it end" in leak.hint
        stuck.set()
        thread.join()


def test_a_server_that_ignores_the_end_of_a_bare_connection(guard):
    async def main():
        async def handle(reader, writer):
            await reader.read()
            try:
                await asyncio.sleep(60)
            finally:
                writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        socket.create_connection(server.sockets[0].getsockname()).close()
        [leak] = await findings_of_async(guard, cwg.Verdict.LEAKED)
        assert leak.observation.record.origin is cwg.Origin.ACCEPTED
        assert leak.observation.record.site.function.endswith("main")
        assert leak.observation.unread == 0
        assert "handle()" in leak.holders[0]
        assert leak.holders[0].startswith("task 'Task-")
        assert "await writer.wait_closed()" in leak.hint
        server.close()

    asyncio.run(main())


def test_a_reconnect_that_forgets_to_close_the_old_connection(guard):
    class Client:
        def __init__(self, address):
            self.address = address
            self.history = []
            self.connect()

        def connect(self):
            self.sock = socket.create_connection(self.address)
            self.history.append(self.sock)

    with socket.create_server(("127.0.0.1", 0)) as server:
        client = Client(server.getsockname())
        peers = [server.accept()[0]]
        peers.pop().close()
        time.sleep(0.3)
        client.connect()
        peers.append(server.accept()[0])
        leak = only(guard, cwg.Verdict.LEAKED, "connect")
        assert "client.history[0]" in leak.holders[0]
        assert "close the old connection before reconnecting" in leak.hint
        [young] = [
            seen.record.serial
            for seen in guard.scan(full=True).observations
            if seen.fd == client.sock.fileno()
        ]
        assert leak.replaced_by == young
        newer = "replaced by a newer connection from the same line"
        assert newer in cwg.render_text(guard.scan())
        for sock in [*client.history, *peers]:
            sock.close()


def test_a_duplicate_that_is_not_closed(guard):
    def duplicate(sock):
        return socket.fromfd(sock.fileno(), sock.family, sock.type)

    with connected_pair() as (mine, theirs):
        copy = duplicate(mine)
        mine.close()
        theirs.close()
        leak = only(guard, cwg.Verdict.LEAKED, "duplicate")
        assert leak.observation.record.origin is cwg.Origin.DUPLICATED
        assert "'copy' of" in leak.holders[0]
        assert "close both" in leak.hint
        copy.close()


def test_a_fixture_that_abandons_one_end_is_found_by_its_label(guard):
    def fixture():
        return socket.socketpair()

    with cwg.label("tests/test_protocol.py::test_hello"):
        near, far = fixture()
    far.close()
    leak = only(guard, cwg.Verdict.LEAKED, "fixture")
    assert leak.observation.record.labels == ("tests/test_protocol.py::test_hello",)
    assert "'near' of" in leak.holders[0]
    near.close()


def test_a_descriptor_that_was_handed_over_names_its_maker_and_who_took_it_over(guard):
    def by_detach(sock):
        return socket.socket(fileno=sock.detach())

    def by_number(sock):
        return socket.socket(fileno=sock.fileno())

    def make(address):
        return socket.create_connection(address)

    with socket.create_server(("127.0.0.1", 0)) as server:
        for take_over in (by_detach, by_number):
            mine = make(server.getsockname())
            copy = take_over(mine)
            server.accept()[0].close()
            leak = only(guard, cwg.Verdict.LEAKED, "make")
            text = " ".join(cwg.render_text(guard.scan()).split())
            line = take_over.__code__.co_firstlineno + 1
            assert f"taken over at {os.path.relpath(__file__)}:{line}" in text, text
            assert leak.hint
            copy.close()
            if take_over is by_number:
                mine.detach()


TWISTED = """
import socket, sys
import closewait_guard as cwg

guard = cwg.install(grace=0.1)
from twisted.internet import protocol, reactor

class Paused(protocol.Protocol):
    def connectionMade(self):
        self.transport.pauseProducing()
        kept.append(self)

class Factory(protocol.Factory):
    protocol = Paused

def listener():
    return socket.create_server(("127.0.0.1", 0))

def adopt_port():
    with listener() as sock:
        sock.setblocking(False)
        reactor.adoptStreamPort(sock.fileno(), socket.AF_INET, Factory())
        peers.append(socket.create_connection(sock.getsockname()))

def connection():
    with listener() as server:
        sock = socket.create_connection(server.getsockname())
        peers.append(server.accept()[0])
        return sock

def adopt_connection():
    with connection() as sock:
        sock.setblocking(False)
        reactor.adoptStreamConnection(sock.fileno(), socket.AF_INET, Factory())

def look(last):
    found = [leak for leak in guard.scan().leaks if leak.verdict == "leaked"]
    if found or last > 100:
        print(" ".join(cwg.render_text(guard.scan()).split()))
        record = found[0].observation.record
        while record:
            print(record.origin, record.stack[0].function, record.site.function)
            record = record.parent
        reactor.stop()
    else:
        reactor.callLater(0.1, look, last + 1)

kept, peers = [], []
reactor.callWhenRunning(globals()[sys.argv[1]])
reactor.callLater(0.3, lambda: [peer.close() for peer in peers])
reactor.callLater(0.4, look, 0)
reactor.run()
"""


@pytest.mark.parametrize(
    ("adopt", "maker", "sentence"),
    [
        ("adopt_port", "listener", "accepted by library code, by a duplicate of the listener"),
        ("adopt_connection", "connection", "duplicated from the socket opened at"),
    ],
)
def test_what_twisted_adopts_names_its_maker_and_the_line_that_handed_it_over(
    adopt, maker, sentence
):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TWISTED, adopt],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert sentence in done.stdout
    assert f" in {adopt}()" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["duplicated", "fromfd", adopt] in lines
    assert [
        "created",
        {"listener": "create_server"}.get(maker, "create_connection"),
        maker,
    ] in lines
