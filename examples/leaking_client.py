"""A client that leaks, the report that names the line, and the client fixed.

python examples/leaking_client.py
"""

from __future__ import annotations

import socket
import threading
import time

import closewait_guard as cwg

Address = tuple[str, int]
pending: list[socket.socket] = []


def shop(listener: socket.socket) -> None:
    """The other side: reads an order, refuses it, closes."""
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        with peer:
            peer.recv(100)
            peer.sendall(b"sold out\n")


def order(server: Address) -> None:
    sock = socket.create_connection(server)
    sock.sendall(b"two apples\n")
    pending.append(sock)  # Until there is an answer; but nothing looks.


def order_fixed(server: Address) -> bytes:
    with socket.create_connection(server) as sock:
        sock.sendall(b"two apples\n")
        return sock.recv(100)


cwg.install(grace=0.2)
listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=shop, args=(listener,)).start()
for _ in range(3):
    order(listener.getsockname())
time.sleep(0.5)
print(cwg.scan())

with cwg.no_leaks(grace=0.2):
    print("fixed:", order_fixed(listener.getsockname()).decode().strip())
for sock in pending:
    sock.close()
listener.shutdown(socket.SHUT_RDWR)
listener.close()
cwg.uninstall()
