"""A test suite that fails for the test that leaks, and for no other.

python examples/pytest_project.py
pytest --socket-leaks=fail examples/pytest_project.py  # what you would do
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

import pytest

kept: list[socket.socket] = []


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_is_answered(server: socket.socket) -> None:
    with socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(b"42")
        assert client.recv(10) == b"42"


def test_forgets_a_client(server: socket.socket) -> None:
    kept.append(socket.create_connection(server.getsockname()))


@pytest.mark.allow_socket_leaks(reason="the connection stays for the next test")
def test_is_allowed_to_keep_one(server: socket.socket) -> None:
    kept.append(socket.create_connection(server.getsockname()))


if __name__ == "__main__":
    failed = pytest.main(["-c", os.devnull, "--socket-leaks=fail", "-q", __file__])
    for sock in kept:
        sock.close()
    sys.exit(failed != pytest.ExitCode.TESTS_FAILED)
