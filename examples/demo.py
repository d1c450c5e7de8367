"""Leak sockets in the classic ways, over loopback, and print the report.

python examples/demo.py
"""

from __future__ import annotations

import socket
import time
import warnings

import closewait_guard as cwg


def fetch_price(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address)  # Nobody closes it.


def read_header(address: tuple[str, int]) -> object:
    sock = socket.create_connection(address)
    header = sock.makefile("rb")
    sock.close()  # The file object keeps the descriptor.
    return header


def forget(address: tuple[str, int]) -> None:
    socket.create_connection(address)


def try_connect(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket()
    try:
        sock.connect(address)
    except ConnectionRefusedError:
        print("nobody there, never mind")
    return sock


def main() -> int:
    warnings.simplefilter("ignore", ResourceWarning)
    cwg.install(grace=0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with cwg.label("refresh-prices"):
            kept: list[object] = [fetch_price(address) for _ in range(3)]
        kept.append(read_header(address))
        forget(address)
        for _ in range(5):
            connection, _ = server.accept()
            connection.sendall(b"42")
            connection.close()
    kept.append(try_connect(address))
    time.sleep(0.5)
    report = cwg.scan()
    print(cwg.render_text(report))
    return 0 if len(report.accused) == 6 else 1


raise SystemExit(main())
