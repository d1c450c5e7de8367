"""Servers and pools with worker processes: what each worker has leaked is in the one report."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from command_line import COMMAND, call, environment
from findings import reports_in
from leaking import ASGI, LEAK, WSGI
from servers import DEADLINE, end, free_port, get, note_started_workers, wait_for_workers

HAPPENS = [pytest.param(True, id="leak"), pytest.param(False, id="no leak")]


def start(tmp_path, *command, **variables):
    """A program below `run`."""
    return subprocess.Popen(
        [*COMMAND, "run", "--fail-on-leak", "--grace", "0.1", *command],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path), **variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def check(code, errors, has_leaked, count=r"\d+"):
    """One report: of what has leaked, with its line, or of no leak; and all of it is known."""
    shown = " ".join(errors.split())
    assert "unknown" not in shown, errors
    assert code == (86 if has_leaked else 0), errors
    assert len(reports_in(errors)) == 1, errors
    found = rf" {count} leaked sockets? from " if has_leaked else "closewait-guard: no leaks"
    assert re.search(found, shown), errors
    assert ("in leak()" in shown) == has_leaked, errors


def end_and_check(running, signum, has_leaked, count):
    """End a program when the grace time is over, and check its report."""
    time.sleep(0.3)
    errors = end(running, signum)
    check(running.returncode, errors, has_leaked, count)


SERVERS = {
    "hypercorn": ("hypercorn", "--workers", "2", "--bind", "127.0.0.1:{port}"),
    "granian": (
        *("granian", "--interface", "asgi", "--workers", "2", "--no-ws"),
        *("--host", "127.0.0.1", "--port", "{port}"),
    ),
    "gunicorn gevent": ("gunicorn", "-w", "2", "-k", "gevent", "-b", "127.0.0.1:{port}"),
    "gunicorn asgi": (
        *("gunicorn", "-w", "2", "-k", "uvicorn_worker.UvicornWorker"),
        *("-b", "127.0.0.1:{port}"),
    ),
    "uvicorn reload": ("uvicorn", "--reload", "--log-level", "error", "--port", "{port}"),
}


@pytest.mark.parametrize("has_leaked", HAPPENS)
@pytest.mark.parametrize("server", SERVERS)
def test_what_workers_of_a_server_leak_is_in_one_report(tmp_path, server, has_leaked):
    (tmp_path / "app.py").write_text(WSGI if "gevent" in server else ASGI)
    port = free_port()
    command = [word.format(port=port) for word in SERVERS[server]]
    pytest.importorskip(command[0])
    if "-k" in command:
        pytest.importorskip(command[command.index("-k") + 1].partition(".")[0])
    note_started_workers(tmp_path)
    with start(tmp_path, *command, "app:app") as running:
        for _ in range(4):
            assert get(port, "/leak" if has_leaked else "/") == b"done"
        if command[0] == "gunicorn":
            wait_for_workers(tmp_path, 2)
        end_and_check(running, signal.SIGTERM, has_leaked, 4)


WATCHED = """
import os
import closewait_guard as cwg

def post_fork(server, worker):
    cwg.watch(interval=0.2, grace=0.1, reporters=["json_lines:" + os.environ["REPORTS"]])
"""


def test_a_worker_of_gunicorn_on_gevent_that_watches_itself_names_the_line(tmp_path):
    pytest.importorskip("gunicorn")
    pytest.importorskip("gevent")
    (tmp_path / "conf.py").write_text(WATCHED)
    (tmp_path / "app.py").write_text(WSGI)
    port, reports = free_port(), tmp_path / "reports"
    options = ("-k", "gevent", "-c", "conf.py", "-b", f"127.0.0.1:{port}")
    with subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *options, "app:app"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path), REPORTS=str(reports)),
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            assert get(port, "/leak") == b"done"
            deadline = time.monotonic() + DEADLINE
            while not reports.exists() or '"function":"leak"' not in reports.read_text():
                assert time.monotonic() < deadline, "no report has the line"
                time.sleep(0.05)
        finally:
            server.terminate()


TASKS = (
    LEAK
    + """
from celery import Celery

folder = os.environ["TASKS"]
app = Celery("tasks", broker="filesystem://")
app.conf.broker_transport_options = {
    "data_folder_in": folder, "data_folder_out": folder, "control_folder": folder + "/control",
}

@app.task
def work(has_leaked, place):
    if has_leaked:
        leak()
    open(f"{folder}/done-{place}", "w").close()
"""
)


@pytest.mark.parametrize("has_leaked", HAPPENS)
def test_what_the_tasks_of_celery_leak_in_its_prefork_pool_is_in_one_report(tmp_path, has_leaked):
    pytest.importorskip("celery")
    (tmp_path / "tasks.py").write_text(TASKS)
    folder = tmp_path / "folder"
    (folder / "control").mkdir(parents=True)
    variables = {"TASKS": str(folder), "PYTHONPATH": str(tmp_path)}
    send = f"from tasks import work\nfor place in range(4): work.delay({has_leaked}, place)"
    options = ["-A", "tasks", "worker", "-P", "prefork", "-c", "2", "--without-mingle"]
    with start(tmp_path, "-m", "celery", *options, TASKS=str(folder)) as running:
        subprocess.run([sys.executable, "-c", send], env=environment(**variables), check=True)
        deadline = time.monotonic() + DEADLINE
        while len(list(folder.glob("done-*"))) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        end_and_check(running, signal.SIGTERM, has_leaked, 4)


EXECUTOR = (
    LEAK
    + """
import multiprocessing, sys, time
from concurrent.futures import ProcessPoolExecutor

def work(has_leaked):
    if has_leaked:
        leak()
    time.sleep(0.2)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        list(executor.map(work, [sys.argv[2] == "leak"] * 4))
"""
)


@pytest.mark.parametrize("has_leaked", HAPPENS)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_what_the_workers_of_an_executor_leak_is_in_one_report(tmp_path, method, has_leaked):
    path = tmp_path / "program.py"
    path.write_text(EXECUTOR)
    what = "leak" if has_leaked else "none"
    done = call("run", "--fail-on-leak", path, method, what)
    check(done.returncode, done.stderr, has_leaked, 4)


POOL = (
    LEAK
    + """
import multiprocessing, time

def work(_):
    leak()
    time.sleep(0.2)

if __name__ == "__main__":
    pool = multiprocessing.get_context("fork").Pool(2)
    pool.map(work, range(4))
    time.sleep(0.3)
    print("done", flush=True)
    time.sleep(60)
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the launcher is the parent")
def test_workers_that_only_the_end_of_their_pools_process_ends_are_in_a_second_report(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(POOL)
    with subprocess.Popen(
        [*COMMAND, "run", "--grace", "0.1", path],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout.readline() == "done\n"
        errors = end(running, signal.SIGTERM)
    assert running.returncode == -signal.SIGTERM
    first, second = errors.split("still running\n")
    assert "leaks unknown: 2 processes (" in first
    assert "unknown" not in second, errors
    assert "\n4 leaked sockets from 1 place in 2 of 2 processes" in second, errors
    assert "cannot report" not in second, errors


SERVICE = (
    LEAK
    + """
import subprocess, sys, time

service = "import socket, time; sock = socket.socket(); print('up', flush=True); time.sleep(60)"
command = [sys.executable, "-c", service]
child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
child.stdout.readline()
print(child.pid, time.monotonic())
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the launcher is the parent")
def test_a_service_that_goes_on_with_its_own_output_is_not_waited_for(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(SERVICE)
    done = call("run", path, code=0)
    pid, ended = int(done.stdout.split()[0]), float(done.stdout.split()[1])
    seconds = time.monotonic() - ended
    os.kill(pid, signal.SIGKILL)
    assert seconds < 9
    assert f"leaks unknown: process {pid} still running" in done.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_helpers_of_multiprocessing_get_no_report_and_are_not_waited_for(tmp_path, method):
    path, shown = tmp_path / "program.py", tmp_path / "shown.jsonl"
    path.write_text(EXECUTOR)
    reporters = ("--report", "text", "--report", f"json_lines:{shown}")
    done = call("run", "--interval", "0.1", *reporters, path, method, "leak", code=0)
    assert "unknown" not in done.stderr, done.stderr
    assert "cannot report" not in done.stderr, done.stderr
    reports = list(map(json.loads, shown.read_text().splitlines()))
    # A worker of a forkserver has the command of that at first.
    workers = {each["pid"] for each in reports if each["command"] == str(path)}
    assert {each["pid"] for each in reports} == workers


FORKS = (
    LEAK
    + """
import sys

for _ in range(2):
    if not os.fork():
        if sys.argv[1] == "leak":
            leak()
        os._exit(0)
for _ in range(2):
    os.wait()
"""
)


@pytest.mark.parametrize("has_leaked", HAPPENS)
def test_what_workers_leak_that_are_forked_by_hand_is_in_one_report(tmp_path, has_leaked):
    path = tmp_path / "program.py"
    path.write_text(FORKS)
    done = call("run", "--fail-on-leak", path, "leak" if has_leaked else "none")
    check(done.returncode, done.stderr, has_leaked, 2)


FORKING = (
    LEAK
    + """
import socketserver, sys, threading

class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        if sys.argv[1] == "own sockets":
            socket.socket().close()
        self.request.sendall(b"x")

class Server(socketserver.ForkingMixIn, socketserver.TCPServer):
    timeout = 0.1

def ask():
    for _ in range(5):
        with socket.create_connection(server.server_address) as client:
            client.recv(9)

server = Server(("127.0.0.1", 0), Handler)
thread = threading.Thread(target=ask)
thread.start()
while thread.is_alive():
    server.handle_request()
server.server_close()
"""
)


@pytest.mark.parametrize("what", ["own sockets", "nothing"])
def test_children_that_end_at_once_have_not_leaked_the_copies_that_they_were_forked_with(
    tmp_path, what
):
    path = tmp_path / "program.py"
    path.write_text(FORKING)
    done = call("run", "--fail-on-leak", path, what)
    check(done.returncode, done.stderr, has_leaked=False)


COPY = (
    LEAK
    + """
import time
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
kept.append(server.accept()[0])
child = os.fork()
if not child:
    client.close()
    # Longer than the grace time, while the peer has ended and the original is closed.
    time.sleep(1)
    os._exit(0)
client.close()
kept.pop().close()
os.waitpid(child, 0)
"""
)


def test_a_copy_that_a_child_has_kept_for_the_grace_time_has_leaked(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(COPY)
    done = call("run", "--fail-on-leak", "--grace", "0.2", path, code=86)
    assert "\n1 leaked socket from " in done.stderr, done.stderr
    assert "unknown" not in done.stderr


def test_the_worker_that_a_reload_ends_has_its_leaks_in_the_report(tmp_path):
    pytest.importorskip("uvicorn")
    app = tmp_path / "app.py"
    app.write_text(ASGI)
    port = free_port()
    command = [word.format(port=port) for word in SERVERS["uvicorn reload"]]
    with start(tmp_path, *command, "app:app") as running:
        assert get(port, "/leak") == b"done"
        time.sleep(0.3)
        app.write_text(ASGI.replace("done", "next"))
        deadline = time.monotonic() + DEADLINE
        while get(port) != b"next":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        end_and_check(running, signal.SIGINT, True, 1)


# The peer is the parent too; it waits for an end of the connection that does not come.
COPIES = """
import multiprocessing, os, signal, socket, sys, time

def connect():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]

def work():
    theirs.close()
    time.sleep(0.5)

how = sys.argv[1]
ours, theirs = connect()
time.sleep(0.1)
if how == "worker":
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child = child.pid
else:
    child = os.fork()
    if child == 0:
        work()
        if how == "served":
            ours.sendall(b"x")
        if how == "terminated":
            time.sleep(60)
        if how == "left":
            time.sleep(3)
        sys.exit()
if how != "kept":
    ours.close()
if how == "left":
    time.sleep(0.5)
    sys.exit()
if how == "terminated":
    time.sleep(1)
    os.kill(child, signal.SIGTERM)
os.waitpid(child, 0)
if how == "served":
    theirs.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the tables of Linux say who has a copy")
@pytest.mark.parametrize("how", ["worker", "exits", "terminated", "left"])
def test_the_last_report_has_what_a_forked_child_keeps_open_unused(tmp_path, how):
    path = tmp_path / "copies.py"
    path.write_text(COPIES)
    program = start(tmp_path, sys.executable, str(path), how)
    errors = program.communicate(timeout=DEADLINE)[1]
    assert program.returncode == 86, errors
    shown = " ".join(errors.split())
    assert " 1 INHERITED " in shown, errors
    assert "in connect()" in shown
    if how == "left":
        assert " 1 leaked socket from 1 place in " in shown, errors
        # The parent has found it, and the child that has outlived it, and with it the peer.
        assert re.search(r" process \d+ and \d+ ", shown), errors
    else:
        assert "has it open unused, and its parent has closed it" in shown


UNREADABLE = """
import os, socket, sys
# That user may not be able to read the interpreter's folder.
import closewait_guard._processes

def connect():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]

ours, theirs = connect()
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    theirs.close()
    os.dup2(reader, 0)
    os.close(writer)
    if sys.argv[1] == "other program":
        os.set_inheritable(ours.fileno(), True)
        os.execvp("cat", ["cat"])
    # Until the parent has ended.
    os.read(0, 1)
    ours.close()
    sys.exit()
print(child, flush=True)
ours.close()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0, reason="only root may change the user"
)
@pytest.mark.parametrize(("how", "code"), [("guarded", 0), ("other program", 87)])
def test_a_child_that_neither_its_parent_nor_a_guard_could_look_into_is_unknown(
    tmp_path, how, code
):
    path = tmp_path / "program.py"
    path.write_text(UNREADABLE)
    done = call("run", "--fail-on-leak", path, how, code=code)
    sentence = f"leaks unknown: what process {done.stdout.strip()} kept open could not be read\n"
    assert (sentence in done.stderr) == (code == 87), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the tables of Linux say who has a copy")
def test_the_last_report_of_watch_names_what_only_a_forked_child_keeps_open(tmp_path):
    path = tmp_path / "copies.py"
    watch = "import closewait_guard as cwg\ncwg.watch(interval=60, grace=0.1, at_exit=True)\n"
    path.write_text(watch + COPIES)
    done = subprocess.run(
        [sys.executable, path, "left"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    shown = " ".join(done.stderr.split())
    # Of the parent: the child has no monitor.
    assert len(reports_in(done.stderr)) == 1, done.stderr
    assert "1 leaked socket from 1 place" in shown
    assert "in connect()" in shown
    assert re.search(r"process \d+ has it open unused, and its parent has closed it", shown)


@pytest.mark.skipif(sys.platform != "linux", reason="the tables of Linux say who has a copy")
@pytest.mark.parametrize("how", ["kept", "served"])
def test_the_last_report_has_no_copy_that_the_parent_has_too_or_the_child_has_used(tmp_path, how):
    path = tmp_path / "copies.py"
    path.write_text(COPIES)
    program = start(tmp_path, sys.executable, str(path), how)
    errors = program.communicate(timeout=DEADLINE)[1]
    check(program.returncode, errors, False)
