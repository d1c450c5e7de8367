"""Through real libraries: the right verdict, and the line of the program, not of the library."""

from __future__ import annotations

import asyncio
import http.client
import socket
import socketserver
import ssl
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import httpx
import pytest
import requests
import trustme

import closewait_guard as cwg

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 10


class Handler(socketserver.BaseRequestHandler):
    """Answers with a part of what it promises, and closes."""

    def handle(self):
        self.request.recv(4096)
        self.request.sendall(ANSWER)


@contextmanager
def serving(context=None):
    class Server(socketserver.ThreadingTCPServer):
        def get_request(self):
            sock, address = super().get_request()
            return (context.wrap_socket(sock, server_side=True) if context else sock), address

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def leaked_by(guard, verdict, function, deadline=10.0):
    """The leak that was opened in a function of this file, waiting for the FIN to arrive."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        for leak in guard.scan().findings:
            site = leak.observation.record.site
            if leak.verdict is verdict and site and site.function.endswith(function):
                return leak
        time.sleep(0.02)
    raise AssertionError(cwg.render_text(guard.scan(full=True)))


def with_requests(url):
    session = requests.Session()
    return session, session.get(url, stream=True)


def with_httpx(url):
    client = httpx.Client()
    return client, client.send(client.build_request("GET", url), stream=True)


def with_http_client(url):
    connection = http.client.HTTPConnection(url.split("/")[2])
    connection.request("GET", "/")
    return connection, connection.getresponse()


@pytest.mark.parametrize("fetch", [with_requests, with_httpx, with_http_client])
def test_a_response_never_read_is_blamed_on_the_programs_line(guard, fetch):
    with serving() as port:
        owner, response = fetch(f"http://127.0.0.1:{port}/")
        leak = leaked_by(guard, cwg.Verdict.LEAKED, fetch.__name__)
        seen = leak.observation
        assert seen.peer == f"127.0.0.1:{port}"
        assert Path(seen.record.site.filename).name == "test_real_programs.py"
        text = cwg.render_text(guard.scan())
        assert fetch.__name__ in text
        assert "response" in leak.hint
        response.close()
        owner.close()
    assert guard.scan().leaks == ()


@pytest.mark.parametrize("fetch", [with_requests, with_httpx, with_http_client])
def test_the_default_depth_reaches_user_code_with_ten_calls_to_spare(guard, fetch):
    with serving() as port:
        owner, response = fetch(f"http://127.0.0.1:{port}/")
        stack = leaked_by(guard, cwg.Verdict.LEAKED, fetch.__name__).observation.record.stack
        response.close()
        owner.close()
    library = next(n for n, frame in enumerate(stack) if frame.kind is cwg.FrameKind.USER)
    assert library + 10 <= cwg.Settings().stack_depth


def test_a_response_of_a_closed_connection_lingers(guard):
    def open_url(url):
        return urllib.request.urlopen(url)

    with serving() as port:
        response = open_url(f"http://127.0.0.1:{port}/")
        leak = leaked_by(guard, cwg.Verdict.LINGERING, "open_url")
        assert leak.observation.unread == 0
        response.close()
    assert guard.scan().leaks == ()


def test_tls_is_blamed_on_the_line_that_made_the_plain_socket(guard):
    authority = trustme.CA()
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(theirs)
    ours = ssl.create_default_context()
    authority.configure_trust(ours)

    def connect(port):
        plain = socket.create_connection(("127.0.0.1", port))
        return ours.wrap_socket(plain, server_hostname="localhost")

    with serving(theirs) as port:
        sock = connect(port)
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        leak = leaked_by(guard, cwg.Verdict.LEAKED, "connect")
        assert leak.observation.tls
        assert leak.observation.record.origin is cwg.Origin.WRAPPED
        assert "create_connection" in leak.observation.record.site.source
        assert "TLS over TCP to 127.0.0.1" in cwg.render_text(guard.scan())
        sock.close()
    assert guard.scan().leaks == ()


def test_an_aiohttp_session_never_closed_names_its_task(guard):
    async def fetch(url):
        session = aiohttp.ClientSession()
        return session, await session.get(url)

    async def main(port):
        task = asyncio.create_task(fetch(f"http://127.0.0.1:{port}/"), name="fetch-prices")
        session, response = await task
        [leak] = [
            leak
            for leak in guard.check(mark).findings
            if leak.observation.record.task == "fetch-prices"
        ]
        assert leak.observation.record.site.function.endswith("fetch")
        response.close()
        await session.close()

    with serving() as port:
        mark = guard.mark()
        asyncio.run(main(port))


def test_an_asyncio_stream_never_closed_is_found(guard):
    async def main(port):
        async def connect():
            return await asyncio.open_connection("127.0.0.1", port)

        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        writer.transport.pause_reading()
        leak = await asyncio.to_thread(leaked_by, guard, cwg.Verdict.LEAKED, "connect")
        assert leak.observation.unread == len(ANSWER)
        writer.close()
        await writer.wait_closed()

    with serving() as port:
        asyncio.run(main(port))


def test_a_connection_that_a_server_accepts_and_forgets_names_its_listener(guard):
    async def main():
        forgotten = []

        async def handle(reader, writer):
            writer.transport.pause_reading()
            forgotten.append(writer)

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()):
            while not forgotten:
                await asyncio.sleep(0.01)
        leak = await asyncio.to_thread(leaked_by, guard, cwg.Verdict.LEAKED, "main")
        assert leak.observation.record.origin is cwg.Origin.ACCEPTED
        assert leak.observation.record.parent.origin is cwg.Origin.CREATED
        assert "handler" in leak.hint
        forgotten[0].close()
        server.close()
        await server.wait_closed()

    asyncio.run(main())
