"""Sockets that came over a fork: who opened them, and which other process holds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
import urllib.request

import pytest

from servers import free_port

PREAMBLE = """
import os, socket, sys, time
import closewait_guard as cwg

def findings_with(guard, verdict):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = [leak for leak in guard.scan().findings if leak.verdict == verdict]
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(cwg.render_text(guard.scan(full=True)))

def connect():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_child_reports_the_parents_creation_and_the_parent_that_still_holds_it():
    run(
        """
        guard = cwg.install(grace=0)
        ours, theirs = connect()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            theirs.close()
            time.sleep(0.3)
            [leak] = findings_with(guard, "inherited")
            record = leak.observation.record
            assert record.parent.pid == parent
            assert record.site.function == "connect"
            assert "open it after forking" in leak.hint
            assert any(f"process {parent} (" in holder for holder in leak.holders), leak.holders
            os._exit(0)
        theirs.close()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """
    )


def test_a_listener_that_another_thread_was_accepting_from_is_not_kept_alive_in_the_child():
    run(
        """
        import gc, threading, weakref, warnings
        warnings.simplefilter("ignore")
        cwg.install()

        def serve():
            server = socket.create_server(("127.0.0.1", 0))
            refs.append((weakref.ref(server), server.getsockname()))
            server.accept()

        refs = []
        thread = threading.Thread(target=serve)
        thread.start()
        while not refs:
            time.sleep(0.01)
        time.sleep(0.1)
        [(ref, address)] = refs
        child = os.fork()
        if child == 0:
            # The frame of the other thread is still there: only what is ours is looked at.
            from closewait_guard._capture.hooks import listener_in_accept_by_thread
            os._exit(len(listener_in_accept_by_thread))
        socket.create_connection(address)
        thread.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """
    )


def test_the_parent_reports_the_children_that_hold_a_copy():
    run(
        """
        import subprocess
        guard = cwg.install(grace=0)
        ours, theirs = connect()
        fd = ours.fileno()
        os.set_inheritable(fd, True)
        command = [sys.executable, "-c", "input()"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, close_fds=False)
        theirs.close()
        time.sleep(0.3)
        [leak] = findings_with(guard, "leaked")
        assert any(f"process {child.pid} (" in holder for holder in leak.holders), leak.holders
        child.communicate(b"x")
        command = [sys.executable, "-c", "import time; time.sleep(30)"]
        pid = os.posix_spawn(sys.executable, command, {})
        guard = cwg.Guard(cwg.Settings(grace=0)).install()
        [leak] = findings_with(guard, "leaked")
        assert any(f"process {pid} (" in holder for holder in leak.holders), leak.holders
        guard.uninstall()
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        ours.close()
        """
    )


def test_a_worker_of_multiprocessing_inherits_and_says_so():
    run(
        """
        import multiprocessing
        guard = cwg.install(grace=0)
        ours, theirs = connect()

        def work(queue):
            theirs.close()
            [leak] = findings_with(guard, "inherited")
            queue.put((leak.hint, leak.observation.record.site.function))

        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=work, args=(queue,))
        process.start()
        theirs.close()
        hint, function = queue.get()
        process.join()
        assert "fork()" in hint and function == "connect"
        ours.close()
        """
    )


GUNICORN = """
import json, socket, time
import closewait_guard as cwg
from gunicorn.app.base import BaseApplication

guard = cwg.install(grace=0)
server = socket.create_server(("127.0.0.1", 0))

def connect():
    return socket.create_connection(server.getsockname())

shared = connect()
peer = server.accept()[0]

def app(environ, start_response):
    peer.close()
    end = time.monotonic() + 60
    found = []
    while time.monotonic() < end and not found:
        found = [leak for leak in guard.scan().findings if leak.verdict == "inherited"]
        time.sleep(0.02)
    reported = [[leak.observation.record.site.function, list(leak.holders)] for leak in found]
    start_response("200 OK", [])
    return [json.dumps(reported).encode()]

class Application(BaseApplication):
    def load_config(self):
        self.cfg.set("bind", "127.0.0.1:PORT")
        self.cfg.set("workers", 1)

        def close_peer(server):
            peer.close()

        self.cfg.set("when_ready", close_peer)

    def load(self):
        return app

Application().run()
"""


def test_a_gunicorn_worker_reports_what_it_inherited_from_the_master(tmp_path):
    port = free_port()
    script = tmp_path / "serve.py"
    script.write_text(GUNICORN.replace("PORT", str(port)))
    master = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
                    reported = json.loads(answer.read())
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.1)
    finally:
        master.terminate()
        master.wait(60)
    functions = dict(reported)
    assert any(f"process {master.pid} (" in holder for holder in functions["connect"])


SPAWNED = """
import multiprocessing, socket, time
import closewait_guard as cwg
from closewait_guard.testing import half_closed_pair

current = None

class App:
    connection = None

def work():
    global current
    guard = cwg.install(grace=0)
    with half_closed_pair() as (App.connection, _), half_closed_pair() as (connection, _):
        current = connection
        del connection
        time.sleep(0.05)
        print(*(holder for leak in guard.scan().leaks for holder in leak.holders), sep="\\n")

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=work)
    process.start()
    process.join()
    work()
"""


def test_the_main_module_of_a_spawned_child_has_the_name_that_its_author_knows(tmp_path):
    script = tmp_path / "shop.py"
    script.write_text(SPAWNED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("__main__.App.connection (class attribute)" in line for line in lines) == 2
    assert sum("__main__.current (module global)" in line for line in lines) == 2
    assert "__mp_main__" not in done.stdout


WATCH = """
def reported(guard):
    end = time.monotonic() + 1
    found = []
    while time.monotonic() < end:
        found += [leak.verdict for leak in guard.scan().leaks]
        time.sleep(0.02)
    return found

def end_by(check):
    try:
        check()
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def succeeded(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_child_reports_the_copy_of_a_connection_that_its_parent_has_closed_while_the_peer_waits():
    run(
        WATCH
        + """
guard = cwg.install(grace=0.1)
ours, theirs = connect()
ours.sendall(b"x")
assert theirs.recv(1) == b"x"
time.sleep(0.1)
child = os.fork()
if child == 0:
    def check():
        [leak] = findings_with(guard, "inherited")
        assert leak.is_leak
        assert leak.observation.state == "ESTABLISHED"
        assert leak.observation.record.parent.pid == os.getppid()
        assert leak.observation.record.site.function == "connect"
        text = cwg.render_text(guard.scan())
        assert f"process {os.getpid()} has it open unused" in " ".join(text.split()), text
    ours.close()
    end_by(check)
theirs.close()
assert succeeded(child)
"""
    )


def test_the_first_scan_of_a_child_says_that_a_later_one_knows_what_it_uses():
    run(
        WATCH
        + """
guard = cwg.install(grace=0.1)
ours, theirs = connect()
child = os.fork()
if child == 0:
    def check():
        told = "1 connection from before its fork, which the parent has closed: a later scan shows"
        time.sleep(0.5)
        first = guard.scan()
        assert not first.leaks and any(told in note for note in first.coverage.notes), first
        findings_with(guard, "inherited")
        assert not any(told in note for note in guard.scan().coverage.notes)
    ours.close()
    end_by(check)
theirs.close()
assert succeeded(child)
"""
    )


def test_a_single_scan_finds_what_a_child_has_not_used_in_the_grace_time_since_its_fork():
    run(
        WATCH
        + """
guard = cwg.install(grace=0.5)
ours, theirs = connect()
ours.sendall(b"x")
assert theirs.recv(1) == b"x"
time.sleep(0.1)
child = os.fork()
if child == 0:
    def check():
        time.sleep(1.2)
        first, second = guard.scan(), guard.scan()
        for report in (first, second):
            [leak] = report.leaks
            assert leak.verdict == "inherited"
            assert leak.observation.suspect_for > 1
            assert not any("later scan" in note for note in report.coverage.notes)
    theirs.close()
    end_by(check)
ours.close()
assert succeeded(child)
"""
    )


def test_a_single_scan_right_after_the_fork_accuses_no_child_of_what_it_may_be_about_to_use():
    run(
        WATCH
        + """
guard = cwg.install(grace=0)
ours, theirs = connect()
ours.sendall(b"x")
assert theirs.recv(1) == b"x"
time.sleep(0.1)
child = os.fork()
if child == 0:
    def check():
        report = guard.scan()
        assert not report.leaks, report
    theirs.close()
    end_by(check)
ours.close()
assert succeeded(child)
"""
    )


def test_a_worker_of_multiprocessing_reports_what_its_parent_has_closed_since_the_fork():
    run(
        WATCH
        + """
import multiprocessing

guard = cwg.install(grace=0.1)

def work(closed):
    closed.wait()
    def check():
        [leak] = findings_with(guard, "inherited")
        assert leak.observation.record.opener.origin == "accepted"
    end_by(check)

def start(closed):
    worker = multiprocessing.get_context("fork").Process(target=work, args=[closed])
    worker.start()
    return worker

closed = multiprocessing.get_context("fork").Event()
ours, theirs = connect()
time.sleep(0.1)
worker = start(closed)
theirs.close()
closed.set()
worker.join()
assert worker.exitcode == 0
"""
    )


def test_a_child_reports_no_copy_that_its_parent_has_open_or_that_it_has_used_since_the_fork():
    run(
        WATCH
        + """
guard = cwg.install(grace=0.1)
ours, kept = connect()
others, served = connect()
time.sleep(0.1)
child = os.fork()
if child == 0:
    def check():
        served.sendall(b"hello")
        assert reported(guard) == []
    end_by(check)
served.close()
assert succeeded(child)
"""
    )


def test_a_forking_server_is_not_reported_while_a_handler_waits_or_works_for_a_silent_client():
    run(
        WATCH
        + """
import socketserver

guard = cwg.install(grace=0.1)

class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        assert reported(guard) == []
        self.request.sendall(b"none")

with socketserver.ForkingTCPServer(("127.0.0.1", 0), Handler) as server:
    client = socket.create_connection(server.server_address)
    time.sleep(0.1)
    server.handle_request()
    client.settimeout(30)
    assert client.recv(4) == b"none"
    client.close()
"""
    )


def test_a_child_that_waits_in_the_kernel_for_its_copy_is_not_reported():
    run(
        WATCH
        + """
import threading

guard = cwg.install(grace=0.1)
ours, theirs = connect()
time.sleep(0.1)
child = os.fork()
if child == 0:
    ours.close()
    def look():
        end_by(lambda: (_ for _ in ()).throw(AssertionError) if reported(guard) else None)
    threading.Thread(target=look).start()
    theirs.recv(1)
theirs.close()
assert succeeded(child)
"""
    )


@pytest.mark.skipif(os.getuid() != 0, reason="only root may change the user")
def test_a_child_of_another_user_says_that_it_cannot_see_what_its_parent_has_closed():
    run(
        """
guard = cwg.install(grace=0)
ours, theirs = connect()
cwg.render_text(guard.scan())
child = os.fork()
if child == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    theirs.close()
    [note] = [note for note in guard.scan().coverage.notes if "parent" in note]
    assert str(os.getppid()) in note and "its copies of 1 connection" in note, note
    os._exit(0)
ours.close()
assert os.waitpid(child, 0)[1] == 0
assert not any("parent" in note for note in guard.scan().coverage.notes)
"""
    )


def test_the_parent_reports_what_only_its_child_keeps_open_with_the_creation_and_the_child():
    run(
        """
guard = cwg.install(grace=0.1)
ours, theirs = connect()
ours.sendall(b"x")
assert theirs.recv(1) == b"x"
time.sleep(0.2)
child = os.fork()
if child == 0:
    theirs.close()
    time.sleep(60)
assert guard.scan().leaks == ()
ours.close()
time.sleep(0.2)
[leak] = findings_with(guard, "inherited")
assert leak.is_leak and leak.observation.state == "ESTABLISHED"
record = leak.observation.record
assert (record.pid, record.parent.pid) == (child, os.getpid())
assert record.site.function == "connect"
assert leak.holders[0].startswith(f"process {child} (")
assert "close it in the child" in leak.hint
text = " ".join(cwg.render_text(guard.scan()).split())
assert f"process {child} has it open unused, and its parent has closed it" in text, text
assert "in connect()" in text
os.kill(child, 9)
os.waitpid(child, 0)
assert [leak for leak in guard.scan().leaks if leak.verdict == "inherited"] == []
theirs.close()
"""
    )


def test_the_parent_reports_no_child_that_serves_what_the_parent_has_accepted_and_closed():
    run(
        """
import socketserver, threading

guard = cwg.install(grace=0.1)

class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.recv(7)
        time.sleep(1)
        self.request.sendall(b"answer")
        time.sleep(60)

with socketserver.ForkingTCPServer(("127.0.0.1", 0), Handler) as server:
    client = socket.create_connection(server.server_address)
    client.sendall(b"request")
    time.sleep(0.2)
    server.handle_request()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        assert guard.scan().leaks == ()
        time.sleep(0.05)
    for child in server.active_children:
        os.kill(child, 9)
    client.close()
"""
    )


@pytest.mark.skipif(os.getuid() != 0, reason="only root may change the user")
def test_the_parent_says_which_children_it_cannot_look_into():
    run(
        """
guard = cwg.install(grace=0)
# That user may not be able to read the interpreter's folder.
import closewait_guard._processes
cwg.render_text(guard.scan())
ours, theirs = connect()
child = os.fork()
if child == 0:
    time.sleep(3)
ours.close()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
notes = guard.scan().coverage.notes
assert any("1 child process may keep open" in note for note in notes), notes
os._exit(0)
"""
    )


def test_the_parent_reports_a_copy_however_many_sockets_were_opened_beside_it():
    run(
        """
import resource

resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
guard = cwg.install(grace=0.1)
ours, theirs = connect()
others = [socket.socket() for _ in range(1500)]
ours.sendall(b"x")
assert theirs.recv(1) == b"x"
time.sleep(0.2)
child = os.fork()
if child == 0:
    theirs.close()
    time.sleep(60)
ours.close()
time.sleep(0.2)
[leak] = findings_with(guard, "inherited")
assert leak.observation.record.site.function == "connect"
os.kill(child, 9)
os.waitpid(child, 0)
"""
    )


def test_the_parent_says_how_many_copies_it_has_forgotten():
    run(
        """
from closewait_guard._capture import creation

creation._MAX_CLOSED_SINCE_FORK = 4
creation._FORGOTTEN_AT_ONCE = 1
guard = cwg.install()
kept = socket.socket()
for _ in range(8):
    sock = socket.socket()
    child = os.fork()
    if child == 0:
        os._exit(0)
    sock.close()
    os.waitpid(child, 0)
notes = guard.scan().coverage.notes
assert any("what child processes keep open of 3 sockets" in note for note in notes), notes
child = os.fork()
if child == 0:
    notes = guard.scan().coverage.notes
    os._exit(any("what child processes keep open" in note for note in notes))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    )


def test_the_parent_says_that_it_has_not_looked_into_all_of_its_children():
    run(
        """
from closewait_guard._processes import report

report._MAX_CHILDREN = 2
guard = cwg.install(grace=0)
ours, theirs = connect()
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    children.append(child)
ours.close()
notes = guard.scan().coverage.notes
for child in children:
    os.kill(child, 9)
    os.waitpid(child, 0)
assert any("child processes beyond the first 2" in note for note in notes), notes
"""
    )
