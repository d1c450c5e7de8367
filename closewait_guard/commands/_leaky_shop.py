"""The program that `closewait-guard demo` runs: a shop that leaks sockets on purpose."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable
from typing import Protocol

try:
    import requests
except ImportError:
    requests = None  # type: ignore[assignment]


class Closable(Protocol):
    def close(self) -> object: ...


Address = tuple[str, int]
kept: list[Closable] = []
stock_is_free = threading.Event()


def dropped(address: Address) -> None:
    socket.create_connection(address)  # No variable is left to close it by.


def thread_stuck(address: Address) -> None:
    threading.Thread(target=place_order, args=[address], name="order-worker", daemon=True).start()


def place_order(address: Address) -> None:
    with socket.create_connection(address) as sock:
        sock.sendall(b"GET /price HTTP/1.1\r\n\r\n")
        stock_is_free.wait()  # An event that nothing sets.


WAYS: dict[str, Callable[[Address], None]] = {"dropped": dropped, "thread stuck": thread_stuck}

if requests:
    session = requests.Session()
    session.trust_env = False  # No proxy for a server on this machine.

    def response_not_read(address: Address) -> None:
        url = "http://{}:{}/catalogue".format(*address)
        while len(kept) < 3:
            kept.append(session.get(url, stream=True))  # Never read to its end.

    def idle_in_pool(address: Address) -> None:
        # As it should be: the session keeps the connection, and the server closes it meanwhile.
        session.get("http://{}:{}/price".format(*address))

    WAYS |= {"response not read": response_not_read, "idle in the pool": idle_in_pool}
else:

    def response_not_read(address: Address) -> None:
        while len(kept) < 3:
            connection = http.client.HTTPConnection(*address)
            connection.request("GET", "/catalogue")
            kept.append(connection.getresponse())  # Never read to its end.

    WAYS["response not read"] = response_not_read


def close_down() -> None:
    """What the shop should have done all along."""
    for each in kept:
        each.close()
    if requests:
        session.close()
    stock_is_free.set()
