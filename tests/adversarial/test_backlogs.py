"""What waits to be accepted is reported of the process that listens for it, and of no other."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

import pytest

from closewait_guard import _processes
from closewait_guard._processes.text import peer_phrase
from closewait_guard.settings import Settings
from command_line import program

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks the kernel")

LISTENER = """
import socket, sys
family, host, port, reuse = sys.argv[1:]
server = socket.socket(getattr(socket, family))
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if int(reuse):
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
if family == "AF_INET6":
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
server.bind((host, int(port)))
server.listen()
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def listen():
    """Starts processes that listen and never accept."""
    with ExitStack() as stack:

        def start(host, port=0, *, reuse=False):
            family = "AF_INET6" if ":" in host else "AF_INET"
            running = program(LISTENER, family, host, port, int(reuse))
            return stack.enter_context(running)

        yield start


def leave_at(host, port, times=1):
    for _ in range(times):
        socket.create_connection((host, int(port))).close()


def backlogs(*processes):
    """For each process, what waits at it for certain, and what may wait at another instead."""
    processes = (
        _processes.ProcessScanner(Settings()).scan([each.pid for each in processes]).processes
    )
    return [(dict(process.backlog), dict(process.uncertain_backlog)) for process in processes]


def test_the_same_port_at_another_address_is_another_listener(listen):
    first = listen("127.0.0.1")
    second = listen("127.0.0.2", first.first_line)
    leave_at("127.0.0.1", first.first_line, 2)
    assert backlogs(first, second) == [({f"127.0.0.1:{first.first_line}": 2}, {}), ({}, {})]


def test_a_listener_of_ipv6_has_what_came_to_it_by_ipv4(listen):
    dual = listen("::", reuse=True)
    port = dual.first_line
    plain = listen("127.0.0.2", port, reuse=True)
    leave_at("127.0.0.1", port)
    leave_at("127.0.0.2", port)
    of_dual, of_plain = backlogs(dual, plain)
    assert of_dual == ({f"[::ffff:127.0.0.1]:{port}": 1}, {})
    assert of_plain == ({f"127.0.0.2:{port}": 1}, {})


def test_at_which_of_two_listeners_that_share_an_address_one_waits_is_not_guessed(listen):
    first = listen("127.0.0.1", reuse=True)
    port = first.first_line
    second = listen("127.0.0.1", port, reuse=True)
    leave_at("127.0.0.1", port, 40)
    address = f"127.0.0.1:{port}"
    assert backlogs(first, second) == [({}, {address: 40})] * 2
    found = _processes.ProcessScanner(Settings()).scan([first.pid])
    text = " ".join(_processes.render_processes(found, only=found.processes).split())
    assert f"40 connections in CLOSE_WAIT in the backlog of {address}: the peer closed" in text
    assert "the kernel does not say which of them has them" in text
    assert "which process is to take 40 connections" in text


def test_of_those_that_share_an_address_only_one_with_a_waiting_client_is_meant(listen):
    general = listen("0.0.0.0", reuse=True)
    port = general.first_line
    single = listen("127.0.0.1", port, reuse=True)
    leave_at("127.0.0.2", port)
    leave_at("127.0.0.1", port)
    of_general, of_single = backlogs(general, single)
    assert of_general == ({f"127.0.0.2:{port}": 1}, {f"127.0.0.1:{port}": 1})
    assert of_single == ({}, {f"127.0.0.1:{port}": 1})


def test_an_empty_backlog_is_not_suspected(listen):
    general = listen("0.0.0.0", reuse=True)
    port = general.first_line
    single = listen("127.0.0.1", port, reuse=True)
    leave_at("127.0.0.1", port)
    assert backlogs(general, single) == [({}, {}), ({f"127.0.0.1:{port}": 1}, {})]


def test_a_client_at_the_port_of_a_foreign_listener_has_not_come_in(listen):
    server = listen("127.0.0.1")
    with socket.create_server(("127.0.0.2", 0)) as other, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind(("127.0.0.3", other.getsockname()[1]))
        client.connect(("127.0.0.1", int(server.first_line)))
        for probe in ("auto", "portable"):
            scanner = _processes.ProcessScanner(Settings(probe=probe))
            [process] = scanner.scan([os.getpid()], everything=True).processes
            [seen] = [
                each
                for each in process.report.observations
                if each.peer == f"127.0.0.1:{server.first_line}"
            ]
            assert peer_phrase(seen).startswith("to "), probe
