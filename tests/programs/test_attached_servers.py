"""Servers that run without the guard are asked what they leak, and lose no request by it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest
from test_workers import ASGI, LEAK, WSGI

from command_line import HAS_REMOTE_EXEC, call, can_attach, environment
from remote.attached import interrupt, wait_until, watching
from servers import DEADLINE, free_port, get, redis_server

pytestmark = pytest.mark.skipif(not can_attach(), reason="no gdb, or no right to use it")

SERVERS = {
    "gunicorn sync": ("gunicorn", "-w", "2", "-b", "127.0.0.1:{port}", "app:app"),
    "gunicorn gthread": (
        *("gunicorn", "-w", "1", "--threads", "4", "-b", "127.0.0.1:{port}", "app:app"),
    ),
    "gunicorn gevent": ("gunicorn", "-w", "1", "-k", "gevent", "-b", "127.0.0.1:{port}", "app:app"),
    "uvicorn": ("uvicorn", "--workers", "2", "--port", "{port}", "app:app"),
}


@contextmanager
def serving(tmp_path, *command, **variables):
    """A server without the guard, and its port."""
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-m", *(word.format(port=port) for word in command)],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path), **variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            assert get(port, "/") == b"done"
            yield server, port
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(DEADLINE)


@pytest.mark.parametrize("server", SERVERS)
def test_what_the_workers_of_a_server_hold_is_in_one_report(tmp_path, server):
    command = SERVERS[server]
    pytest.importorskip(command[0])
    if "gevent" in server:
        pytest.importorskip("gevent")
    (tmp_path / "app.py").write_text(ASGI if command[0] == "uvicorn" else WSGI)
    with serving(tmp_path, *command) as (program, port):
        for _ in range(4):
            assert get(port, "/leak") == b"done"
        time.sleep(1.1)
        text = " ".join(call("attach", program.pid, "--tree", code=0).stdout.split())
        assert re.search(r" 4 leaked sockets from unknown places", text), text
        assert "held by app.kept[0]" in text
        # A watch has the lines of the next. Its descriptors are still those that it had, and these.
        fds = count_descriptors(program.pid)
        with watching(program, "--tree") as watch:
            for _ in range(4):
                assert get(port, "/leak") == b"done"
            text, _, status = interrupt(watch)
        assert (status, text.count("in leak()")) == (0, 1), text
        assert re.search(r"\b4 LEAKED", text), text
        assert count_descriptors(program.pid) == fds + 4
        assert get(port, "/") == b"done"


def count_descriptors(root):
    from closewait_guard._threads import descendants_of

    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (root, *descendants_of(root, 99)))


def test_in_green_workers_none_is_left_in(tmp_path):
    pytest.importorskip("gevent")
    (tmp_path / "app.py").write_text(WSGI)
    folder = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with serving(tmp_path, *SERVERS["gunicorn gevent"], **folder) as (program, port):
        done = call("attach", program.pid, "--tree", "--install", code=2)
        assert "its threads are green ones" in done.stderr
        call("attach", program.pid, "--uninstall", code=0)
        assert get(port, "/") == b"done"


TASKS = (
    LEAK
    + """
from celery import Celery

app = Celery("tasks", broker=os.environ["BROKER"])

@app.task(ignore_result=True)
def work(place=None):
    if place is not None:
        leak()
        open(f"done-{place}", "w").close()
"""
)
# Idle children run no Python code: they wait for the next task.
SENDS = """
import select, sys
from tasks import work

for place in range(4):
    work.delay(place)
while not select.select([0], [], [], 0.05)[0]:
    work.delay()
"""


def test_what_the_tasks_of_celery_hold_in_its_prefork_pool_is_in_one_report(tmp_path):
    pytest.importorskip("celery")
    (tmp_path / "tasks.py").write_text(TASKS)
    options = ("-P", "prefork", "-c", "2", "--without-mingle", "--without-gossip")
    with redis_server() as port:
        variables = environment(BROKER=f"redis://127.0.0.1:{port}/0", PYTHONPATH=str(tmp_path))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        worker = [sys.executable, "-m", "celery", "-A", "tasks", "worker", *options]
        send = [sys.executable, "-c", SENDS]
        with (
            subprocess.Popen(worker, cwd=tmp_path, env=variables, **quiet) as program,
            subprocess.Popen(send, cwd=tmp_path, env=variables, stdin=subprocess.PIPE) as sender,
        ):
            try:
                wait_until(lambda: len(list(tmp_path.glob("done-*"))) == 4)
                done = call("attach", program.pid, "--tree", code=0, CLOSEWAIT_GUARD_GRACE="0")
            finally:
                sender.stdin.close()
                program.terminate()
    text = " ".join(done.stdout.split())
    assert re.search(r" 4 leaked sockets from unknown places", text), text
    assert "held by tasks.kept[0]" in text
    assert "Asked 3 Python processes." in text


THREADED = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"done")
    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
server.daemon_threads = True
server.serve_forever(0.05)
"""
ATTACHES = int(os.environ.get("ATTACHES", "20"))


def test_a_server_under_load_is_asked_again_and_again_and_loses_no_request(tmp_path, capsys):
    (tmp_path / "threaded.py").write_text(THREADED)
    with serving(tmp_path, "threaded", "{port}") as (program, port):
        is_over, times, failures = threading.Event(), [], []
        clients = [
            threading.Thread(target=ask_until, args=(is_over, port, times, failures))
            for _ in range(4)
        ]
        for client in clients:
            client.start()
        try:
            pauses = [pause_of(program) for _ in range(ATTACHES)]
        finally:
            is_over.set()
            for client in clients:
                client.join()
        assert not failures
        assert len(times) > ATTACHES
        method = "remote-exec" if HAS_REMOTE_EXEC else "gdb"
        with capsys.disabled():
            print(
                f"\n{ATTACHES} attaches by {method}, {len(times):,} requests, none lost: "
                f"stopped for {max(pauses)} ms at most, slowest request {max(times) * 1000:.0f} ms"
            )


def pause_of(program):
    text = call("attach", program.pid, code=0).stdout
    found = re.search(r"was stopped for (\d+) ms", text)
    return int(found[1]) if found else 0


def ask_until(is_over, port, times, failures):
    while not is_over.is_set():
        began = time.monotonic()
        try:
            url = f"http://127.0.0.1:{port}/"
            with urllib.request.urlopen(url, timeout=DEADLINE) as response:
                assert response.read() == b"done"
        except Exception as error:
            failures.append(error)
        times.append(time.monotonic() - began)
