"""The program that `demo` runs: a shop that asks a price server, and leaks in the classic ways."""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.request
from collections.abc import Callable
from typing import Protocol

Address = tuple[str, int]


def missing_close(shop: Shop) -> None:
    for _ in range(3):
        connection = http.client.HTTPConnection(*shop.server)
        connection.request("GET", "/price")
        connection.getresponse().read()
        shop.kept.append(connection)  # Nobody closes it.


def response_not_read(shop: Shop) -> None:
    host, port = shop.server
    response = urllib.request.urlopen(f"http://{host}:{port}/catalogue")
    if response.status == 200:
        shop.kept.append(response)  # It has a body, which is never read to its end.


def makefile_kept(shop: Shop) -> None:
    sock = socket.create_connection(shop.server)
    shop.kept.append(sock.makefile("rb"))
    sock.close()  # The file still holds the descriptor.


def pool_idle(shop: Shop) -> None:
    connections = [socket.create_connection(shop.server) for _ in range(2)]
    shop.pool.extend(connections)  # For later: the server does not wait so long.


def thread_stuck(shop: Shop) -> None:
    def place_order() -> None:
        sock = socket.create_connection(shop.server)
        shop.stock_is_free.wait()  # A lock that is never released.
        sock.close()

    shop.worker = threading.Thread(target=place_order, name="order-worker", daemon=True)
    shop.worker.start()


def dropped(shop: Shop) -> None:
    socket.create_connection(shop.server)  # The last variable that could close it: none.


WAYS: dict[str, Callable[[Shop], None]] = {
    "missing close": missing_close,
    "response not read": response_not_read,
    "makefile kept": makefile_kept,
    "pool idle": pool_idle,
    "thread stuck": thread_stuck,
    "dropped": dropped,
}


class Closable(Protocol):
    def close(self) -> object: ...


class Shop:
    """Keeps what it should have closed, until `close_down()`."""

    def __init__(self, server: Address) -> None:
        self.server = server
        self.kept: list[Closable] = []
        self.pool: list[socket.socket] = []
        self.stock_is_free = threading.Event()
        self.worker: threading.Thread | None = None

    def close_down(self) -> None:
        for each in (*self.kept, *self.pool):
            each.close()
        self.stock_is_free.set()
        if self.worker is not None:
            self.worker.join()
