"""Real servers on loopback: HTTP that closes on request, Redis, PostgreSQL."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trustme

from command_line import environment

# Longer than any program takes on a busy machine.
DEADLINE = 60.0


class Web:
    """HTTP/1.1 with keep-alive. `hang_up()` closes every connection from the server's side.

    What is asked for `/wait` is answered when `released` is set, as is the rest of `/half`.
    """

    def __init__(self, context=None):
        self.connections, self.released = set(), threading.Event()
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                web.connections.add(self.request)

            def finish(self):
                super().finish()
                web.connections.discard(self.request)

            def do_GET(self):
                if self.path == "/nothing":
                    self.close_connection = True
                    return
                if self.path == "/wait":
                    web.released.wait(DEADLINE)
                # Who has asked may have gone by now.
                with suppress(OSError):
                    self.answer()

            def answer(self):
                whole = self.path != "/partial"
                self.send_response({"/redirect": 302, "/unavailable": 503}.get(self.path, 200))
                self.send_header("Content-Length", "1000")
                if self.path == "/redirect":
                    self.send_header("Location", "/")
                self.end_headers()
                self.wfile.write(b"x" * (500 if whole else 10))
                if self.path == "/half":
                    self.wfile.flush()
                    web.released.wait(DEADLINE)
                self.wfile.write(b"x" * (500 if whole else 0))
                self.wfile.flush()
                self.close_connection = not whole

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            # Closing the server waits for its handlers.
            daemon_threads = False

            def get_request(self):
                sock, address = super().get_request()
                return (context.wrap_socket(sock, server_side=True) if context else sock), address

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        scheme, host = ("https", "localhost") if context else ("http", "127.0.0.1")
        self.url = f"{scheme}://{host}:{self.port}"

    def hang_up(self):
        for sock in list(self.connections):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)


@contextmanager
def web(context=None):
    served = Web(context)
    thread = threading.Thread(target=served.server.serve_forever, args=(0.01,), name="web")
    thread.start()
    try:
        yield served
    finally:
        served.server.shutdown()
        thread.join()
        served.released.set()
        for sock in list(served.connections):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        served.server.server_close()


WEB = """
import sys
from servers import web
with web() as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


@contextmanager
def web_elsewhere():
    """The URL of one in another process: its threads might need clients of their own here."""
    with subprocess.Popen(
        [sys.executable, "-c", WEB],
        env=environment(PYTHONPATH=str(Path(__file__).parent)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process.stdout.readline().strip()
        process.stdin.close()


def authority():
    """A certificate authority's contexts: the server's, the client's, and its file's bytes."""
    made = trustme.CA()
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.issue_cert("localhost").configure_cert(theirs)
    ours = ssl.create_default_context()
    made.configure_trust(ours)
    return theirs, ours, made.cert_pem.bytes()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def get(port, path="/"):
    """The answer to one request, once the server listens."""
    end = time.monotonic() + DEADLINE
    while True:
        try:
            url = f"http://127.0.0.1:{port}{path}"
            with urllib.request.urlopen(url, timeout=DEADLINE) as response:
                return response.read()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def end(process, signum):
    """End a program by a signal: what it has written to stderr."""
    process.send_signal(signum)
    return process.communicate(timeout=DEADLINE)[1]


# A worker of gunicorn loses a signal that comes before it has handlers of its own: it is killed,
# after the time for a graceful end.
_NOTES_ITS_START = """
import os

def post_worker_init(worker):
    open(f"started-{os.getpid()}", "w").close()
"""


def note_started_workers(folder):
    """Let the workers of a gunicorn that starts in a folder say there that they have started."""
    (folder / "gunicorn.conf.py").write_text(_NOTES_ITS_START)


def wait_for_workers(folder, count):
    """Wait until so many workers of `note_started_workers()` take signals."""
    deadline = time.monotonic() + DEADLINE
    while len(list(folder.glob("started-*"))) < count:
        assert time.monotonic() < deadline, "a worker of gunicorn does not start"
        time.sleep(0.02)


@contextmanager
def _running(command, port, **options):
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
    )
    try:
        _wait_for(port)
        yield process
    finally:
        process.terminate()
        process.wait(DEADLINE)


def _wait_for(port):
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")


@contextmanager
def redis_server():
    """The port of a Redis that keeps nothing."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    command = [
        program,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
    ]
    with _running(command, port):
        yield port


@contextmanager
def postgres():
    """The port of a PostgreSQL with a database `postgres` that trusts everybody on loopback."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not programs:
        pytest.skip("PostgreSQL is not installed")
    binaries, as_user = programs[-1].parent, {}
    # Not below pytest's own, which every run of pytest that starts closes to other users.
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        if os.geteuid() == 0:
            # It refuses to run as root.
            as_user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(folder, "postgres", "postgres")
        data = f"{folder}/data"
        made = subprocess.run(
            [binaries / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync"],
            check=False,
            capture_output=True,
            cwd=folder,
            **as_user,
        )
        assert made.returncode == 0, made.stderr
        port = free_port()
        command = [binaries / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-F"]
        with _running([*command, "-k", folder], port, cwd=folder, **as_user):
            # It listens before it takes connections.
            ready = [binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            end = time.monotonic() + DEADLINE
            while subprocess.run(ready, check=False, timeout=DEADLINE).returncode:
                assert time.monotonic() < end, "PostgreSQL takes no connections"
                time.sleep(0.05)
            yield port
