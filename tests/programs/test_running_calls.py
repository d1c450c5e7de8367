"""A connection that a running call has not done with is no leak yet; a call that never ends is."""

from __future__ import annotations

import asyncio
import http.server
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest

import closewait_guard as cwg
from closewait_guard._holders import threads
from closewait_guard._live.frames import shows_other_threads
from command_line import documents
from findings import findings_of, reports_in
from servers import DEADLINE, free_port

sees_calls = pytest.mark.skipif(
    not shows_other_threads(), reason="this Python cannot show them safely"
)

SLOW_VIEW = """
import time

def heavy_report():
    time.sleep(30)

def app(environ, start_response):
    heavy_report()
    start_response("200 OK", [("Content-Length", "0")])
    return []
"""

WORKER_WITH_GUARD = """
import closewait_guard as cwg

def show(report):
    with open({path!r}, "a") as file:
        file.write(cwg.render_text(report, everything=True))

def post_fork(server, worker):
    cwg.install(grace=0.1, age_warning={age_warning}, reporters=[show])
    cwg.watch(interval=0.3)
"""


@contextmanager
def started(command, port, folder):
    """A program that listens, ended by SIGTERM."""
    with subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_until(lambda: can_connect(port))
            yield process
        finally:
            process.terminate()


def can_connect(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def wait_until(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def report_of_gunicorn(folder, wanted, age_warning):
    """What a sync worker reports while the client of a slow view is gone, up to some words."""
    reports, port = folder / "reports.txt", free_port()
    (folder / "slow.py").write_text(SLOW_VIEW)
    (folder / "conf.py").write_text(
        WORKER_WITH_GUARD.format(path=str(reports), age_warning=age_warning)
    )
    command = ["gunicorn", "-c", "conf.py", "-b", f"127.0.0.1:{port}", "--graceful-timeout", "0"]
    with started([*command, "slow:app"], port, folder):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: reports.exists() and wanted in " ".join(reports.read_text().split()))
        return " ".join(reports.read_text().split())


@sees_calls
def test_a_view_whose_client_has_left_is_no_leak_while_it_runs(tmp_path):
    text = report_of_gunicorn(tmp_path, "still in", age_warning=300)
    assert "HALF CLOSED" in text
    assert "the client disconnected " in text
    assert "slow.py:5 heavy_report()" in text
    assert "LEAKED" not in text


@sees_calls
def test_a_view_that_never_ends_is_leaked_once_it_is_too_old(tmp_path):
    text = report_of_gunicorn(tmp_path, "1 LEAKED", age_warning=1)
    leaked = text.partition("1 LEAKED")[2]
    assert "slow.py:5" in leaked
    assert "heavy_report()" in leaked


@sees_calls
def test_an_event_loop_that_is_blocked_is_named_in_place_of_its_sockets():
    unblocked, blocked = threading.Event(), threading.Event()

    async def handle(reader, writer):
        await reader.read(1)
        blocked.set()
        unblocked.wait()
        writer.close()

    async def serve(address, done):
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        address.append(server.sockets[0].getsockname())
        await asyncio.to_thread(done.wait)
        server.close()

    address, done = [], threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serve(address, done)), name="loop-1")
    with cwg.Guard(cwg.Settings(grace=0.1, age_warning=60)) as guard:
        thread.start()
        wait_until(lambda: address)
        clients = [socket.create_connection(address[0]) for _ in range(3)]
        wait_until(lambda: len(guard.scan(full=True).observations) >= 7)
        clients[0].sendall(b"x")
        blocked.wait()
        for client in clients:
            client.close()
        try:
            found = findings_of(guard, cwg.Verdict.HALF_CLOSED, 3)
            assert guard.scan().leaks == ()
        finally:
            unblocked.set()
            done.set()
            thread.join()
    for finding in found:
        assert "the event loop of thread loop-1: the loop is blocked at" in finding.holders[0]
        assert "handle()" in finding.holders[0]
        assert finding.hint.startswith("do not block the event loop: ")
        assert finding.severity is cwg.Severity.INFO


class Whole(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "50000")
        self.end_headers()
        self.wfile.write(b"x" * 50_000)

    def log_message(self, *_):
        pass


@contextmanager
def http_server():
    with http.server.HTTPServer(("127.0.0.1", 0), Whole) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@sees_calls
def test_a_response_whose_rest_is_read_slowly_is_in_use_until_it_is_forgotten():
    step, read, kept = threading.Event(), threading.Event(), []

    def fetch(url):
        response = urllib.request.urlopen(url)
        response.read(100)
        read.set()
        step.wait()  # It works with what it has read.
        kept.append(response)

    with cwg.Guard(cwg.Settings(grace=0.05)) as guard, http_server() as url:
        thread = threading.Thread(target=fetch, args=(url,))
        thread.start()
        read.wait()
        time.sleep(0.3)
        assert [each.verdict for each in guard.scan().findings] == []
        step.set()
        thread.join()
        findings_of(guard, cwg.Verdict.LINGERING)
        kept.pop().close()


def test_a_response_that_was_read_between_two_scans_is_in_use_until_that_is_too_long_ago():
    settings = cwg.Settings(grace=0.05, age_warning=0.5)
    with cwg.Guard(settings) as guard, http_server() as url:
        response = urllib.request.urlopen(url)
        findings_of(guard, cwg.Verdict.LINGERING)
        response.read(20_000)
        guard.scan()
        time.sleep(0.2)
        assert guard.scan().leaks == ()
        findings_of(guard, cwg.Verdict.LINGERING)
        response.close()


@sees_calls
def test_a_response_that_is_read_by_a_call_for_too_long_lingers():
    step, read = threading.Event(), threading.Event()

    def fetch(url):
        with urllib.request.urlopen(url) as response:
            response.read(100)
            read.set()
            step.wait()

    settings = cwg.Settings(grace=0.05, age_warning=0.5)
    with cwg.Guard(settings) as guard, http_server() as url:
        thread = threading.Thread(target=fetch, args=(url,))
        thread.start()
        read.wait()
        [finding] = findings_of(guard, cwg.Verdict.LINGERING)
        step.set()
        thread.join()
    assert any("fetch()" in holder for holder in finding.holders)


def test_the_parent_of_uvicorn_workers_has_a_bound_socket_and_no_finding(tmp_path):
    (tmp_path / "app.py").write_text(
        "async def app(scope, receive, send):\n"
        "    await send({'type': 'http.response.start', 'status': 200, 'headers': []})\n"
        "    await send({'type': 'http.response.body', 'body': b''})\n"
    )
    port = free_port()
    run = ["closewait_guard", "run", "--grace", "0.1", "--interval", "0.3", "--report", "text"]
    run += ["--report", "json_lines:reports.jsonl"]
    serve = ["uvicorn", "--workers", "2", "--lifespan", "off", "--port", str(port), "app:app"]
    with started([*run, "--", *serve], port, tmp_path) as process:
        time.sleep(1.5)
        process.terminate()
        _, stderr = process.communicate(timeout=DEADLINE)
    reports = documents((tmp_path / "reports.jsonl").read_text())
    assert 1 in {each.open_sockets for each in reports if each.pid == process.pid}
    assert not any(each.findings for each in reports)
    shown = reports_in(stderr)
    assert shown
    assert all(line.startswith("closewait-guard: no leaks") for line in shown), stderr


@sees_calls
def test_a_report_says_that_it_has_not_looked_at_all_running_calls(monkeypatch):
    monkeypatch.setattr(threads, "_MAX_FRAMES", 2)
    wait = threading.Event()
    thread = threading.Thread(target=wait.wait)
    ours, theirs = socket.socketpair()
    with cwg.Guard(cwg.Settings(grace=0.01)) as guard:
        server = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(server.getsockname())
        accepted = server.accept()[0]
        thread.start()
        client.close()
        findings_of(guard, cwg.Verdict.LEAKED, 1)
        notes = guard.scan().coverage.notes
    wait.set()
    thread.join()
    for sock in (ours, theirs, server, accepted):
        sock.close()
    assert any("what running calls do with connections: not all" in note for note in notes), notes
