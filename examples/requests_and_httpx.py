"""The two usual mistakes with HTTP clients: a stream that is not read, a client for every call.

python examples/requests_and_httpx.py
"""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import requests

import closewait_guard as cwg


class Prices(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # Connections stay for the next request ...
    timeout = 0.2  # ... but not for long.

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "30000")
        self.end_headers()
        self.wfile.write(b"42 " * 10_000)

    def log_message(self, *_: object) -> None: ...


def is_there(url: str, seen: list[requests.Response]) -> bool:
    response = requests.get(url, stream=True, timeout=5)
    seen.append(response)  # The body is never read: `with requests.get(...) as response:`
    return response.ok


def fetch_price(url: str, clients: list[httpx.Client]) -> str:
    client = httpx.Client()
    clients.append(client)  # One for every call, never closed: `with httpx.Client() as client:`
    return client.get(url).text[:2]


cwg.install(grace=0.2)
server = ThreadingHTTPServer(("127.0.0.1", 0), Prices)
threading.Thread(target=server.serve_forever).start()
url = f"http://127.0.0.1:{server.server_port}/"
seen: list[requests.Response] = []
clients: list[httpx.Client] = []
for _ in range(3):
    is_there(url, seen)
    fetch_price(url, clients)
time.sleep(0.5)
print(cwg.scan())
for close in (*(each.close for each in seen), *(each.close for each in clients)):
    close()
server.shutdown()
server.server_close()
cwg.uninstall()
