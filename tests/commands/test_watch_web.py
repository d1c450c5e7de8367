"""`watch --web`: a live page for who knows its address, and no one else."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import pytest
from test_watch import GROWING, grow

from browser import CHROMIUM, browser
from command_line import COMMAND, call, environment, program
from remote.programs import INSTALL, LEAK, STUCK, line_of, running

_DEADLINE = 30.0


@contextmanager
def watching(*arguments, **variables):
    """The command, and the address that it prints."""
    with subprocess.Popen(
        [*COMMAND, "watch", *map(str, arguments), "--interval", "0.2", "--web"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(CLOSEWAIT_GUARD_GRACE="0", **variables),
    ) as started:
        try:
            line = started.stdout.readline()
            assert line, started.stderr.read()
            yield started, line.split()[0]
        finally:
            started.kill()


@pytest.fixture(scope="module")
def growing():
    with program(GROWING) as running:
        grow(running, 3)
        yield running


@pytest.fixture(scope="module")
def web(growing):
    with watching(growing.pid) as (_, url):
        yield urlsplit(url)


def ask(url, path=None, method="GET", **headers):
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=_DEADLINE)
    try:
        connection.request(method, url.path if path is None else path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


def until(condition):
    end = time.monotonic() + _DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_who_knows_the_address_gets_the_page_and_no_cache_keeps_it(web, growing):
    assert web.hostname == "127.0.0.1"
    assert re.fullmatch(r"/[0-9a-f]{48}/", web.path)
    status, page, headers = ask(web)
    assert status == 200
    assert "leaked sockets from 1 place" in page
    assert f"127.0.0.1:{growing.first_line}" in page
    assert 'data-interval="0.2"' in page
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Frame-Options"] == "DENY"
    assert not any(name.lower().startswith("access-control") for name in headers)


def test_every_other_request_is_refused(web):
    port = web.port
    assert ask(web, "/")[0] == 403
    assert ask(web, web.path[:-2] + "/")[0] == 403
    assert ask(web, "/" + "0" * 48 + "/")[0] == 403
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert ask(web, Host=host)[0] == 403
    for host in ("localhost:9", f"[::1]:{port}", "127.0.0.1"):
        assert ask(web, Host=host)[0] == 200
    for method in ("POST", "HEAD", "PUT", "OPTIONS"):
        assert ask(web, method=method)[0] == 405
    assert ask(web, method="POST", path="/")[0] == 403
    page = ask(web)[1]
    for path in ("/", "/" + "0" * 48 + "/"):
        assert web.path not in ask(web, path)[1]
    assert web.path.strip("/") not in page


def test_clients_that_are_slow_or_odd_stop_neither_the_page_nor_the_watch(web, growing):
    address = web.hostname, web.port
    with ExitStack() as stack:
        for _ in range(80):
            slow = stack.enter_context(socket.create_connection(address))
            slow.sendall(b"GET ")
        # One that does not read what it has asked for.
        full = f"GET {web.path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        stack.enter_context(socket.create_connection(address)).sendall(full)
        for odd in (b"\0" * 20_000, b"\r\n\r\n", b"GET\r\n\r\n", full.replace(b"Host", b"Hose")):
            with socket.create_connection(address, timeout=_DEADLINE) as client:
                client.sendall(odd)
                try:
                    assert re.match(rb"HTTP/1.1 40[03] ", client.recv(100))
                except ConnectionResetError:
                    # What it sent beyond the limit was not read.
                    assert len(odd) > 8192
        before = ask(web)[1]
        grow(growing)
        until(lambda: ask(web)[1] != before)
        assert ask(web)[0] == 200


def test_ctrl_c_ends_it_while_a_client_waits(growing):
    with watching(growing.pid) as (started, url):
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)):
            started.send_signal(signal.SIGINT)
            assert started.wait(_DEADLINE) == -signal.SIGINT
            assert started.stderr.read() == ""


WAITS = """
import socket
from closewait_guard.commands import _watch_web
_watch_web._MAX_SECONDS = 0.1
server = _watch_web.PageServer(("127.0.0.1", 0))
port = int(server.url.split(":")[2].partition("/")[0])
with socket.create_connection(("127.0.0.1", port), timeout=30) as silent:
    print(silent.recv(1))
"""


def test_a_client_that_asks_for_nothing_is_let_go():
    assert call("-c", WAITS, command=[sys.executable], code=0).stdout == "b''\n"


def test_it_listens_where_it_is_wanted_and_says_where_it_cannot(growing):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = call("watch", growing.pid, "--web", f"127.0.0.1:{port}", code=2)
        expected = f"closewait-guard: --web: cannot listen on 127.0.0.1:{port}: "
        assert done.stderr.startswith(expected)
    for option in ("--web", "--metrics"):
        done = call("watch", growing.pid, option, "a..b:0", code=2)
        assert done.stderr.startswith(f"closewait-guard: {option}: cannot listen "), done.stderr
    assert "expected HOST:PORT, got '4242'" in call("watch", "--web", "4242", code=2).stderr


def test_a_process_with_a_guard_answers_itself(tmp_path):
    with running(INSTALL + LEAK + STUCK, tmp_path) as started:
        pid = int(line_of(started))
        with watching(pid, XDG_RUNTIME_DIR=str(tmp_path)) as (_, url):
            until(lambda: "__main__.kept (module global)" in ask(urlsplit(url))[1])


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
def test_in_a_browser_it_is_refreshed_in_place_and_says_when_it_is_over(growing, tmp_path):
    with browser(tmp_path) as chromium, watching(growing.pid) as (started, url):
        page = chromium.open(url)
        page.fill("#text", "leaked")
        page.click("th.count button")
        page.click("#fold")
        total = page.texts(".totals")
        grow(growing, 2)
        page.until(f"document.querySelector('.totals').textContent !== {total[0]!r}")
        assert page.evaluate("document.getElementById('text').value") == "leaked"
        assert page.evaluate("document.querySelector('th.count').ariaSort") == "descending"
        assert not page.evaluate("document.querySelector('.finding').open")
        assert page.errors() == []
        assert set(page.requests()) <= {url, "data:,"}
        started.kill()
        page.until("!document.getElementById('lost').hidden")
        assert page.texts("#findings .finding")
