"""The page of `watch --web`: what is on it, and a server for those who know its address.

The server has one thread, which waits for no client: each has some seconds, and a newer one takes
the place of the oldest.
"""

from __future__ import annotations

import ipaddress
import os
import selectors
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

from closewait_guard._cpython import compare_digest
from closewait_guard._processes import ProcessReport, ProcessScan, sentences_on_others
from closewait_guard._remote import RemoteError, ask_control, has_control
from closewait_guard._render import from_dict, is_quiet, render_page
from closewait_guard._stream import layout_of
from closewait_guard.commands._reports import parts_of, programs_of
from closewait_guard.exceptions import ConfigurationError, ReportFormatError
from closewait_guard.model import Report

__all__ = [
    "FullReports",
    "PageServer",
    "live_page",
]


# What is on the page.


def live_page(
    found: ProcessScan, full: Mapping[int, Report], interval: float, *, everything: bool
) -> str:
    """The page of one scan.

    Args:
        found: What was seen from outside.
        full: What processes have answered themselves, which has more.
        interval: After how many seconds there is another.
        everything: Show the processes without leaks, too.
    """
    shown = [each for each in found.processes if everything or _is_suspect(each, full)]
    reports = [full.get(each.report.pid, each.report) for each in shown]
    parts = parts_of(programs_of(reports)) if reports else []
    return render_page(
        parts, layout_of(), sentences_on_others(found, only=shown), interval=interval
    )


def _is_suspect(process: ProcessReport, full: Mapping[int, Report]) -> bool:
    report = full.get(process.report.pid, process.report)
    return any(not is_quiet(each.verdict, each.severity) for each in report.findings)


# A scan from inside costs the process more than one from outside.
_SECONDS_BETWEEN_ASKING = 5.0
_MAX_SECONDS_TO_ANSWER = 5.0
_THREADS = 4


class FullReports:
    """The last full reports of the processes that have a control socket.

    They are asked beside the scans, by threads that keep this process from nothing.
    """

    def __init__(self) -> None:
        self._due: SimpleQueue[int] = SimpleQueue()
        self._asked_at: dict[int, float] = {}
        self._known: dict[int, Report] = {}
        for _ in range(_THREADS):
            Thread(target=self._ask_forever, daemon=True).start()

    def of(self, pids: Iterable[int]) -> dict[int, Report]:
        """What is known of these processes; those that were not asked for a while are asked now."""
        wanted = list(pids)
        for pid in self._asked_at.keys() - wanted:
            del self._asked_at[pid]
            self._known.pop(pid, None)
        now = time.monotonic()
        for pid in wanted:
            if now - self._asked_at.get(pid, float("-inf")) >= _SECONDS_BETWEEN_ASKING:
                # One that does not answer is asked again after that.
                self._asked_at[pid] = now + _MAX_SECONDS_TO_ANSWER
                self._due.put(pid)
        return {pid: report for pid in wanted if (report := self._known.get(pid)) is not None}

    def _ask_forever(self) -> None:
        while True:
            pid = self._due.get()
            report = _ask(pid)
            if report is None:
                self._known.pop(pid, None)
            else:
                self._known[pid] = report
            self._asked_at[pid] = time.monotonic()


def _ask(pid: int) -> Report | None:
    """The report of a process, if it has a guard that answers."""
    if not has_control(pid):
        return None
    try:
        answer = ask_control(pid, {"request": "report"}, _MAX_SECONDS_TO_ANSWER)
        return from_dict(answer.get("report", {}))
    except (RemoteError, ReportFormatError, OSError):
        return None


# The server.

_MAX_CLIENTS = 32
_MAX_SECONDS = 30.0
_MAX_REQUEST = 8192
_HEADERS = """\
Content-Type: text/html; charset=utf-8
Cache-Control: no-store
Connection: close
Referrer-Policy: no-referrer
X-Content-Type-Options: nosniff
X-Frame-Options: DENY
Cross-Origin-Resource-Policy: same-origin
"""


class PageServer:
    """Serves one page to those who know its address.

    Args:
        address: Where to listen, as `127.0.0.1:8080`; the port 0 is any that is free.

    Attributes:
        url: The page's address, with a token that cannot be guessed.
        page: What is served.

    Raises:
        ConfigurationError: It cannot listen there.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        host, port = address
        self._host = host.lower()
        self.page = b""
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server(address, family=family)
        except (OSError, TypeError) as error:
            # Of another type for a name that no host can have.
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"--web: cannot listen on {host}:{port}: {reason}") from error
        self._listener.setblocking(False)  # noqa: FBT003
        token = os.urandom(24).hex()
        self._path = f"/{token}/".encode()
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._listener.getsockname()[1]}/{token}/"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._clients: list[_Client] = []
        Thread(target=self._serve_forever, daemon=True).start()

    def _serve_forever(self) -> None:
        while True:
            for key, _ in self._selector.select(1.0 if self._clients else None):
                if key.data is None:
                    self._accept()
                elif key.data in self._clients:
                    self._proceed(key.data)
            for client in [each for each in self._clients if time.monotonic() > each.deadline]:
                self._close(client)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            # No descriptor is left: one of the clients gives up its own soon.
            time.sleep(0.05)
            return
        if len(self._clients) >= _MAX_CLIENTS:
            self._close(self._clients[0])
        sock.setblocking(False)  # noqa: FBT003
        client = _Client(sock)
        self._clients.append(client)
        self._selector.register(sock, selectors.EVENT_READ, client)

    def _proceed(self, client: _Client) -> None:
        """Read what there is, or send what can be sent."""
        try:
            if client.rest is None:
                if not client.read():
                    return
                client.rest = memoryview(self._answer(client.received))
                self._selector.modify(client.sock, selectors.EVENT_WRITE, client)
            client.rest = client.rest[client.sock.send(client.rest) :]
        except BlockingIOError:
            return
        except OSError:
            self._close(client)
            return
        if not client.rest:
            self._close(client)

    def _close(self, client: _Client) -> None:
        self._clients.remove(client)
        self._selector.unregister(client.sock)
        with suppress(OSError):
            client.sock.shutdown(socket.SHUT_WR)
        client.sock.close()

    def _answer(self, request: bytes) -> bytes:
        head = request.partition(b"\r\n\r\n")[0].split(b"\r\n")
        method, _, rest = head[0].partition(b" ")
        path, _, version = rest.partition(b" ")
        if b"\r\n\r\n" not in request or not version.startswith(b"HTTP/1."):
            return _response("400 Bad Request")
        # A page elsewhere whose name has come to mean this machine has that name as its host.
        is_known = compare_digest(path, self._path)
        if not (is_known and self._is_own(_hosts_in(head[1:]))):
            return _response("403 Forbidden")
        if method != b"GET":
            return _response("405 Method Not Allowed", extra="Allow: GET\n")
        return _response("200 OK", self.page)

    def _is_own(self, hosts: Sequence[str]) -> bool:
        """Whether one host was named, by its number or by a name that no one else can give it."""
        if len(hosts) != 1:
            return False
        name, colon, port = hosts[0].rpartition(":")
        name = name if colon and port.isdecimal() else hosts[0]
        with suppress(ValueError):
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
            return True
        return name in ("localhost", self._host)


class _Client:
    """One connection.

    Attributes:
        received: Of the request.
        rest: What of the answer was not sent yet; None while there is none.
        deadline: When it is over, however far it has come.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        self.rest: memoryview | None = None
        self.deadline = time.monotonic() + _MAX_SECONDS

    def read(self) -> bool:
        """Whether there will be no more to read that counts."""
        part = self.sock.recv(_MAX_REQUEST)
        self.received += part
        is_whole = b"\r\n\r\n" in self.received or len(self.received) > _MAX_REQUEST
        return is_whole or not part


def _hosts_in(lines: Iterable[bytes]) -> list[str]:
    fields = (line.decode("latin-1").partition(":") for line in lines)
    return [value.strip().lower() for name, _, value in fields if name.lower() == "host"]


def _response(status: str, page: bytes | None = None, extra: str = "") -> bytes:
    content = f"{status}\n".encode() if page is None else page
    head = f"HTTP/1.1 {status}\n{_HEADERS}{extra}Content-Length: {len(content)}\n\n"
    return head.replace("\n", "\r\n").encode() + content
