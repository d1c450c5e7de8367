"""Real HTTP servers and clients: each request over a connection of its own."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple


class Program(NamedTuple):
    """A server, begun in a thread, that says its port; and what makes one request to a port."""

    server: Callable[[], int]
    client: Callable[[int], Callable[[], None]]


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: the server closes after each answer."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"42")

    def log_message(self, *_: object) -> None:
        pass


def _standard_server() -> int:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


def _standard_client(port: int) -> Callable[[], None]:
    def fetch() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/")
        connection.getresponse().read()
        connection.close()

    return fetch


async def _application(_: Any, __: Any, send: Any) -> None:
    headers = [(b"content-length", b"2"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"42"})


def _uvicorn_server() -> int:
    import uvicorn

    config = uvicorn.Config(
        _application, port=0, log_level="error", lifespan="off", loop="asyncio", http="h11"
    )
    server = uvicorn.Server(config)
    Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return int(server.servers[0].sockets[0].getsockname()[1])


def _requests_client(port: int) -> Callable[[], None]:
    import requests

    def fetch() -> None:
        requests.get(f"http://127.0.0.1:{port}/", timeout=10)

    return fetch


# The leanest that Python can do, and what many programs use.
PROGRAMS = {
    "http.server, http.client": Program(_standard_server, _standard_client),
    "uvicorn, requests": Program(_uvicorn_server, _requests_client),
}
