"""The last report of real servers: what has leaked is not missing from it, however they end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time

import pytest

from command_line import COMMAND, call, environment
from findings import reports_in
from servers import end, free_port, get, note_started_workers, wait_for_workers

APP = """
import asyncio, socket

kept = []

class Deaf(asyncio.Protocol):
    def __init__(self):
        self.has_ended = asyncio.Event()

    def eof_received(self):
        self.has_ended.set()
        return True

async def forget(reader, writer):
    writer.close()

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    server = await asyncio.start_server(forget, "127.0.0.1", 0)
    loop = asyncio.get_running_loop()
    for _ in range(3):
        address = server.sockets[0].getsockname()
        kept.append(await loop.create_connection(Deaf, *address))
        await kept[-1][1].has_ended.wait()
    # The grace time begins with the last of the ends.
    await asyncio.sleep(0.2)
    server.close()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})
"""


def end_uvicorn(tmp_path, loop, signum, *options):
    """The exit status and errors of a server that has leaked three sockets, ended by a signal."""
    (tmp_path / "app.py").write_text(APP)
    port = free_port()
    command = ["-m", "uvicorn", "--loop", loop, "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(
        [*COMMAND, "run", *options, "--grace", "0.1", *command, "app:app"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path)),
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert get(port) == b"done"
        errors = end(server, signum)
    return server.returncode, errors


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_uvicorn_reports_its_leaks_when_it_is_terminated(tmp_path, loop):
    status, errors = end_uvicorn(tmp_path, loop, signal.SIGTERM)
    assert status == -signal.SIGTERM, errors
    assert "\n3 leaked sockets from " in errors, errors


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_uvicorn_reports_its_leaks_when_it_is_interrupted_and_its_loop_closes_them(tmp_path, loop):
    status, errors = end_uvicorn(tmp_path, loop, signal.SIGINT, "--fail-on-leak")
    assert status == 86, errors
    assert "\n3 leaked sockets from " in errors, errors
    assert ("closed only when the program ended" in errors) == (loop == "uvloop"), errors


SESSIONS = """
import atexit, http.server, sys, threading, time
import requests

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 0.05

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *arguments):
        pass

def close():
    for session in sessions:
        session.close()

sessions = []
if sys.argv[1] == "before":
    atexit.register(close)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
for _ in range(15):
    session = requests.Session()
    session.get(f"http://127.0.0.1:{server.server_port}/")
    sessions.append(session)
if sys.argv[1] == "after":
    atexit.register(close)
time.sleep(0.5)
server.shutdown()
server.server_close()
"""


@pytest.mark.parametrize(("closed", "code"), [("never", 86), ("before", 0), ("after", 0)])
def test_sessions_that_only_a_finalizer_closes_have_leaked(tmp_path, closed, code):
    path = tmp_path / "sessions.py"
    path.write_text(SESSIONS)
    done = call("run", "--fail-on-leak", path, closed, code=code)
    assert ("closed only when the program ended" in done.stderr) == bool(code), done.stderr
    assert ("\n15 leaked sockets from " in done.stderr) == bool(code), done.stderr
    assert ("closewait-guard: no leaks" in done.stderr) == (not code), done.stderr


WATCH = "import closewait_guard as cwg\ncwg.watch(reporters=['text'], at_exit=True, grace=0.1)\n"


def last_report(errors):
    return errors[errors.rindex(reports_in(errors)[-1]) :]


@pytest.mark.parametrize("closed", ["never", "after"])
def test_watch_reports_the_sessions_that_only_a_finalizer_closes(tmp_path, closed):
    path = tmp_path / "sessions.py"
    path.write_text(WATCH + SESSIONS)
    done = subprocess.run(
        [sys.executable, path, closed],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=True,
    )
    report = last_report(done.stderr)
    assert ("closed only when the program ended" in report) == (closed == "never"), report
    assert ("\n15 leaked sockets from " in report) == (closed == "never"), report
    assert report.startswith("closewait-guard: no leaks (") == (closed == "after"), report


PERIODIC = """
import atexit, socket, time
server = socket.create_server(("127.0.0.1", 0))
kept = socket.create_connection(server.getsockname())
server.accept()[0].close()
reported = []
time.sleep(0.2)
atexit.register(kept.close)
"""


@pytest.mark.parametrize("is_reported", [True, False])
def test_what_a_report_has_found_has_leaked_though_the_end_closes_it(tmp_path, is_reported):
    path = tmp_path / "program.py"
    report = "cwg.install().report()\n" if is_reported else ""
    path.write_text(f"{WATCH}{PERIODIC}{report}")
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=60, env=environment()
    )
    last = last_report(done.stderr)
    assert ("closed only when the program ended" in last) == is_reported, last
    assert ("\n1 leaked socket from " in last) == is_reported, last
    assert "CLOSED LATE" not in last


def test_leaks_that_were_too_many_to_be_remembered_until_the_end_are_counted(tmp_path):
    path = tmp_path / "program.py"
    few = "from closewait_guard._signal import early_looks\nearly_looks._MAX_FINDINGS = 2\n"
    more = "kept_too = [kept]\nfor _ in range(4):\n    ours, theirs = socket.socketpair()\n"
    more += "    theirs.close()\n    kept_too.append(ours)\n    atexit.register(ours.close)\n"
    path.write_text(f"{WATCH}{few}{PERIODIC}{more}time.sleep(0.2)\ncwg.install().report()\n")
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=60, env=environment()
    )
    last = last_report(done.stderr)
    assert "2 leaked sockets from 2 places. 3 leaks left out." in " ".join(last.split()), last


REGISTERED = """
import atexit, socket, time, weakref
import closewait_guard as cwg

class Client:
    connection = None

    def report(self, report):
        pass

def leak():
    server = socket.create_server(("127.0.0.1", 0))
    kept = socket.create_connection(server.getsockname())
    server.accept()[0].close()
    server.close()
    return kept

cwg.install(grace=0.1)
by_function, by_finalizer, client = leak(), leak(), Client()
client.connection = by_finalizer
if {is_before}:
    atexit.register(by_function.close)
    weakref.finalize(client, by_finalizer.close)
# A reporter that has a connection closes nothing.
cwg.watch(reporters=["text", client.report], at_exit=True)
if not {is_before}:
    atexit.register(by_function.close)
    weakref.finalize(client, by_finalizer.close)
time.sleep(0.3)
"""


@pytest.mark.parametrize("is_before", [True, False])
def test_exit_functions_that_are_registered_before_watch_run_after_its_last_report(
    tmp_path, is_before
):
    path = tmp_path / "program.py"
    path.write_text(REGISTERED.format(is_before=is_before))
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=60, env=environment()
    )
    last = last_report(done.stderr)
    found = "2 leaked sockets" if is_before else "1 leaked socket"
    assert f"\n{found} from 1 place." in last, last
    assert ("closed only when the program ended" in last) == (not is_before), last


PROGRAMMATIC = """
import uvicorn
uvicorn.run("app:app", loop="uvloop", port={port}, log_level="error")
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_watch_reports_what_uvloop_closes_with_its_loop(tmp_path, signum):
    (tmp_path / "app.py").write_text(APP)
    port = free_port()
    path = tmp_path / "program.py"
    path.write_text(WATCH + PROGRAMMATIC.format(port=port))
    with subprocess.Popen(
        [sys.executable, path], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    ) as server:
        assert get(port) == b"done"
        errors = end(server, signum)
    assert "\n3 leaked sockets from " in last_report(errors), errors


GREEN = """
from gevent import monkey; monkey.patch_all()
{watch}
import gevent, os, socket, subprocess
server = socket.create_server(("127.0.0.1", 0))
kept = [socket.create_connection(server.getsockname()) for _ in range(3)]
for _ in kept:
    server.accept()[0].close()
# From outside, so that the handler runs in the hub, which must not wait.
sender = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -{signum} {{os.getpid()}}"])
gevent.sleep(20)
"""


@pytest.mark.parametrize("signum", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("run", [True, False])
def test_a_program_on_gevent_reports_its_leaks_when_a_signal_ends_it(tmp_path, run, signum):
    pytest.importorskip("gevent")
    path = tmp_path / "program.py"
    path.write_text(GREEN.format(watch="" if run else WATCH, signum=signum.removeprefix("SIG")))
    start = [*COMMAND, "run", "--grace", "0.1"] if run else [sys.executable]
    done = subprocess.run(
        [*start, path], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert done.returncode == -signal.Signals[signum], done.stderr
    assert "\n3 leaked sockets from " in last_report(done.stderr), done.stderr


ABANDONED = """
import asyncio, sys

class Deaf(asyncio.Protocol):
    def eof_received(self):
        return True

async def main():
    async def forget(reader, writer):
        writer.close()

    server = await asyncio.start_server(forget, "127.0.0.1", 0)
    loop = asyncio.get_running_loop()
    loop.kept, _ = await loop.create_connection(Deaf, *server.sockets[0].getsockname())
    await asyncio.sleep(0.3)
    if sys.argv[1] == "closed":
        loop.kept.close()
    server.close()

asyncio.run(main())
"""


@pytest.mark.parametrize(("how", "code"), [("abandoned", 86), ("closed", 0)])
def test_a_transport_that_asyncio_gives_up_with_its_loop_has_leaked(tmp_path, how, code):
    path = tmp_path / "transport.py"
    path.write_text(ABANDONED)
    done = call("run", "--fail-on-leak", "--grace", "0.05", path, how, code=code)
    assert ("\n1 leaked socket from " in done.stderr) == bool(code), done.stderr


def test_exit_functions_and_loops_are_as_they_were_when_the_program_looks_at_them(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        "import asyncio, atexit, inspect, socket\n"
        "socket.socket().close()\n"
        "@atexit.register\ndef first():\n    print('first')\n"
        "atexit.register(print, 'second', end='!\\n')\n"
        "atexit.register(print, 'never')\natexit.unregister(inspect.getsource)\n"
        "loop = asyncio.new_event_loop()\nloop.close()\nloop.close()\n"
        "print(loop.is_closed(), first.__name__)\n"
    )
    done = call("run", path, code=0)
    assert done.stdout == "True first\nnever\nsecond!\nfirst\n"


WSGI = """
import socket

kept = []

def app(environ, start_response):
    server = socket.create_server(("127.0.0.1", 0))
    kept.append(socket.create_connection(server.getsockname()))
    server.accept()[0].close()
    server.close()
    start_response("200 OK", [("Content-Length", "4"), ("Connection", "close")])
    return [b"done"]
"""
GUNICORN = ("gunicorn", "--log-level", "critical", "-w", "2", "-b")


@pytest.mark.parametrize(
    ("command", "source"),
    [
        ((*GUNICORN, "127.0.0.1:{port}"), WSGI),
        ((*GUNICORN, "127.0.0.1:{port}", "-k", "gthread"), WSGI),
        (("uvicorn", "--log-level", "error", "--workers", "2", "--port", "{port}"), APP),
    ],
    ids=["gunicorn sync", "gunicorn gthread", "uvicorn --workers"],
)
def test_what_workers_leak_is_in_one_report_and_fails_the_run(tmp_path, command, source):
    (tmp_path / "app.py").write_text(source)
    note_started_workers(tmp_path)
    port = free_port()
    words = [word.format(port=port) for word in command]
    with subprocess.Popen(
        [*COMMAND, "run", "--fail-on-leak", "--grace", "0.1", *words, "app:app"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path)),
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        for _ in range(4):
            assert get(port) == b"done"
        if command[0] == "gunicorn":
            wait_for_workers(tmp_path, 2)
        time.sleep(0.5)
        errors = end(server, signal.SIGTERM)
    assert server.returncode == 86, errors
    count = 4 if source is WSGI else 12
    assert len(reports_in(errors)) == 1, errors
    found = rf" {count} leaked sockets from .* in [12] of [23] processes"
    # A worker may not have been asked for anything.
    assert re.search(found, " ".join(errors.split())), errors
