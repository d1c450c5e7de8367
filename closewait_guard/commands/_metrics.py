"""`--metrics` of `run` and `watch`: the numbers of several processes at one address."""

from __future__ import annotations

import os
import re
import select
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from closewait_guard._numbers import Numbers, numbers_from, numbers_of, with_fewer_sites
from closewait_guard.exceptions import ConfigurationError

if TYPE_CHECKING:
    from closewait_guard._processes import ProcessScan, ProcessScanner
    from closewait_guard.integrations.prometheus import ProcessNumbers

__all__ = [
    "MetricsServer",
    "serve_program",
    "with_metrics",
]


_MOST_SITES = 20
# Each waits most of the time.
_MAX_THREADS, _MAX_SECONDS = 16, 2.0
_ADDRESS = re.compile(r"(?:(?P<host>[^:\[\]]+)|\[(?P<ipv6>[0-9a-fA-F:.]+)\]):(?P<port>\d{1,5})")


class MetricsServer(socketserver.ThreadingMixIn, WSGIServer):
    """Answers scrapes; it listens as soon as it is made.

    Args:
        address: Where, as HOST:PORT.

    Raises:
        ConfigurationError: It cannot listen there.
        MissingExtraError: prometheus_client is not installed.
    """

    daemon_threads = True

    def __init__(self, address: str) -> None:
        from closewait_guard.integrations import prometheus

        self._make_app = prometheus.make_app
        host, port = _parsed(address)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, TypeError) as error:
            # Of another type for a name that no host can have.
            why = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"--metrics: cannot listen at {address}: {why}") from error

    def server_bind(self) -> None:
        """Without asking the name service for a name of this machine, which may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def start(self, read: Callable[[], Iterable[ProcessNumbers]], *labels: str) -> None:
        """Answer from a thread, with what `read` returns for each process."""
        self.set_app(self._make_app(read, labels))
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(WSGIRequestHandler):
    # Of one that asks for nothing.
    timeout = 10

    def log_message(self, *_: object) -> None:
        """Standard error is for reports."""


def _parsed(address: str) -> tuple[str, int]:
    found = _ADDRESS.fullmatch(address)
    if found is None or int(found["port"]) > 65_535:
        from closewait_guard._config import shown

        raise ConfigurationError(
            f"--metrics: expected HOST:PORT, such as 127.0.0.1:9464, got {shown(address)}"
        )
    return found["host"] or found["ipv6"], int(found["port"])


def with_metrics(scans: Iterator[ProcessScan], address: str) -> Iterator[ProcessScan]:
    """The scans of `watch`, of which the latest is served meanwhile."""
    latest: list[ProcessNumbers] = []
    with MetricsServer(address) as server:
        for number, found in enumerate(scans):
            latest[:] = _numbers_of_scan(found)
            if not number:
                # Who asks before there is anything waits for it.
                server.start(latest.copy, "pid", "program")
            yield found


def _numbers_of_scan(found: ProcessScan) -> Iterator[ProcessNumbers]:
    for process in found.processes:
        if process.report.open_sockets:
            numbers = numbers_of(process.report, states=process.states)
            labels = str(process.report.pid), process.report.command
            yield labels, with_fewer_sites(numbers, _MOST_SITES)


def serve_program(server: MetricsServer, program: int, end: int, scanner: ProcessScanner) -> None:
    """In a process beside the program: serve the numbers of all its processes until it has ended.

    Args:
        server: Listens already.
        program: The first of its processes.
        end: A descriptor that is readable when that has ended.
        scanner: Knows which others there are.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    # Who reads the program's output waits until no process has it.
    os.dup2(null, sys.stderr.fileno())
    os.close(null)
    server.start(lambda: _ask_all(program, scanner), "pid")
    select.select([end], [], [])


def _ask_all(program: int, scanner: ProcessScanner) -> list[ProcessNumbers]:
    """Those with a guard, each with what it says of its latest report, which needs no scan."""
    from closewait_guard._remote import has_control

    pids = [pid for pid in scanner.with_descendants([program]) if has_control(pid)]
    with ThreadPoolExecutor(_MAX_THREADS) as pool:
        return [((str(pid),), found) for pid, found in zip(pids, pool.map(_ask, pids), strict=True)]


def _ask(pid: int) -> Numbers | None:
    from closewait_guard._remote import RemoteError, ask_control

    try:
        answer = ask_control(pid, {"request": "numbers"}, _MAX_SECONDS)
    except RemoteError:
        return None
    return with_fewer_sites(numbers_from(answer.get("numbers")), _MOST_SITES)
