"""The server of the demonstration: answers each connection once, and hangs up at once."""

from __future__ import annotations

import socket
import threading
from typing import Self

__all__ = ["PriceServer"]

# How long it waits for a request, and looks whether it is to stop, in seconds.
_PATIENCE = 0.1
_CATALOGUE = b"a chair, a table, a lamp\n" * 800


class PriceServer:
    """Over loopback, in a thread of its own, while the block lasts."""

    def __enter__(self) -> Self:
        self._stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_PATIENCE)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._thread = threading.Thread(target=self._serve, name="price-server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(_PATIENCE)
                _answer(connection)


def _answer(connection: socket.socket) -> None:
    try:
        request = connection.recv(4096)
    except OSError:
        # It asks nothing: like any server, this one does not wait for ever.
        return
    body = _CATALOGUE if b"/catalogue" in request else b"42"
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection.sendall(head + body)
