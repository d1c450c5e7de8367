"""`report`: what running processes say of themselves, whatever they do."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from contextlib import suppress

import pytest

from command_line import COMMAND, call
from remote.programs import DEADLINE, INSTALL, LEAK, STUCK, eventually, line_of, report_of, running

RUN = (*COMMAND, "run", "--grace", "0")


def test_a_program_of_run_answers_while_it_is_stuck_in_accept(tmp_path):
    program = tmp_path / "server.py"
    program.write_text(LEAK + STUCK)
    with running(str(program), tmp_path, command=RUN, stderr=subprocess.DEVNULL) as started:
        report = report_of(int(line_of(started)))
    [finding] = report["findings"]
    assert finding["verdict"] == "leaked"
    assert finding["observation"]["record"]["stack"][-1]["filename"] == str(program)


@pytest.mark.parametrize("off", ["0", "false"])
def test_what_run_guards_does_not_answer_where_that_is_turned_off(tmp_path, off):
    program = tmp_path / "server.py"
    program.write_text("import os\nprint(os.listdir(os.environ['XDG_RUNTIME_DIR']))")
    command = (*RUN, "--control", off)
    with running(str(program), tmp_path, command=command, stderr=subprocess.DEVNULL) as started:
        assert line_of(started) == "['server.py']"


def test_a_program_of_run_that_installs_a_guard_too_has_one_control_socket(tmp_path):
    program = tmp_path / "server.py"
    program.write_text(INSTALL + LEAK + "cwg.uninstall()" + STUCK)
    with running(str(program), tmp_path, command=RUN, stderr=subprocess.DEVNULL) as started:
        pid = int(line_of(started))
        assert report_of(pid)["pid"] == pid
        assert len(list((tmp_path / "closewait_guard").iterdir())) == 1


def ask(*arguments, folder, code=0):
    """The command, in the environment of whose control sockets lie in a folder."""
    return call("report", *map(str, arguments), code=code, XDG_RUNTIME_DIR=str(folder))


@pytest.fixture
def leaking(tmp_path):
    """The number of a process that leaks and answers."""
    with running(INSTALL + LEAK + STUCK, tmp_path) as program:
        yield int(line_of(program))


def test_a_report_is_printed_as_show_does_with_the_line_and_what_holds_it(leaking, tmp_path):
    text = ask(leaking, folder=tmp_path).stdout
    assert f"(pid {leaking} on " in text
    assert "1 leaked socket from 1 place" in text
    assert "held by  __main__.kept (module global)" in text


def test_as_json_it_is_a_line_that_show_reads(leaking, tmp_path):
    done = ask(leaking, "--json", "--fail-on-leak", folder=tmp_path, code=1)
    assert json.loads(done.stdout)["pid"] == leaking
    shown = call("show", "-", stdin=done.stdout).stdout
    assert shown == ask(leaking, folder=tmp_path).stdout or "1 leaked socket" in shown


def test_a_leak_is_an_error_only_where_that_is_wanted(leaking, tmp_path):
    ask(leaking, folder=tmp_path, code=0)
    ask(leaking, "--fail-on-leak", folder=tmp_path, code=1)


# One socket of a guarded program, which inspecting fails for.
UNDESCRIBABLE = """
import closewait_guard._inspect.scanner as scanner
real, odd = scanner.endpoint_of, socket.socket()

def fails(sock, fd):
    if sock is odd:
        raise RuntimeError("not this one")
    return real(sock, fd)

scanner.endpoint_of = fails
"""


def test_a_gate_does_not_pass_over_what_was_not_looked_at(tmp_path):
    listening = "import os, socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
    program = f"{INSTALL}{listening}{UNDESCRIBABLE}{STUCK}"
    with running(program, tmp_path) as started:
        pid = int(line_of(started))
        sentence = f"leaks unknown: process {pid}: looking at 1 socket has failed\n"
        done = ask(pid, "--json", "--fail-on-leak", folder=tmp_path, code=87)
        assert done.stderr == f"closewait-guard: {sentence}"
        asked = call("attach", pid, "--fail-on-leak", code=87, XDG_RUNTIME_DIR=str(tmp_path))
        assert sentence in asked.stderr
        assert "leaks unknown" not in ask(pid, folder=tmp_path).stderr
    saved = tmp_path / "report.json"
    saved.write_text(done.stdout)
    assert sentence in call("show", saved, "--fail-on-leak", code=87).stderr
    assert sentence in call("show", "--diff", saved, saved, "--fail-on-leak", code=87).stderr
    call("show", saved, code=0)
    # What is known comes first.
    with running(f"{INSTALL}{LEAK}{UNDESCRIBABLE}{STUCK}", tmp_path) as started:
        done = ask(line_of(started), "--fail-on-leak", folder=tmp_path, code=1)
        assert "leaks unknown" in done.stderr


def test_each_obstacle_is_one_sentence_and_the_others_are_printed(leaking, tmp_path):
    unguarded = os.getpid()
    done = ask(leaking, 4194999, unguarded, folder=tmp_path, code=2)
    assert "1 leaked socket" in done.stdout
    assert done.stderr.splitlines() == [
        "closewait-guard: no such process: 4194999",
        f"closewait-guard: process {unguarded} has no control socket: start it by `closewait-guard "
        "run`, or call install(control=True) in it; as it is, ask it by `closewait-guard attach "
        f"{unguarded}`",
    ]


def test_one_that_is_stopped_is_waited_for_as_long_as_was_said(leaking, tmp_path):
    os.kill(leaking, signal.SIGSTOP)
    try:
        done = ask(leaking, "--timeout", "0.3", folder=tmp_path, code=2)
    finally:
        os.kill(leaking, signal.SIGCONT)
    assert done.stderr == (
        f"closewait-guard: process {leaking}: the other process did not answer within 0.3 s\n"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
def test_a_process_of_another_user_is_refused_with_what_to_do(leaking):
    done = subprocess.run(
        ["setpriv", "--reuid=54321", "--clear-groups", *COMMAND, "report", str(leaking)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "Permission denied" in done.stderr or "No module" in done.stderr:
        pytest.skip("another user cannot run this Python")
    assert done.returncode == 2
    assert done.stderr == (
        f"closewait-guard: process {leaking} belongs to user root: run this as that user or as "
        "root\n"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "report: missing PID (or use --name NAME)"),
        (("--name", "no-such"), "no process of a program named 'no-such' is running"),
    ],
)
def test_what_means_no_process_is_refused(tmp_path, given, message):
    assert ask(*given, folder=tmp_path, code=2).stderr == f"closewait-guard: {message}\n"


def test_reports_at_intervals_are_started_and_stopped(tmp_path):
    with running(INSTALL + LEAK + STUCK, tmp_path, stderr=subprocess.PIPE) as program:
        pid = int(line_of(program))
        done = ask(pid, "--start", "0.1", folder=tmp_path)
        assert done.stdout == f"Process {pid} prints a report to its stderr every 0.1 s.\n"
        assert program.stderr.readline().startswith("closewait-guard")
        done = ask(pid, "--stop", folder=tmp_path)
        assert done.stdout == f"Process {pid} prints no more reports at intervals.\n"
        assert "it prints no reports at" in ask(pid, "--stop", folder=tmp_path, code=2).stderr


WORKERS = """
import os, socket, sys, time
server = socket.create_server(("127.0.0.1", 0))
kept = []
def leak():
    kept.append(socket.create_connection(server.getsockname()))
    server.accept()[0].close()
for number in range(3):
    if not os.fork():
        for _ in range(number):
            leak()
        break
else:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_the_workers_of_a_program_are_one_report_and_children_left_out_are_counted(tmp_path):
    path = tmp_path / "forking_server.py"
    path.write_text(WORKERS)
    with running(str(path), tmp_path, command=RUN, stderr=subprocess.DEVNULL) as started:
        pid = int(line_of(started))
        try:
            eventually(lambda: len(list((tmp_path / "closewait_guard").iterdir())) == 4)
            tree, alone = ask(pid, "--tree", folder=tmp_path), ask(pid, folder=tmp_path)
            named = ask("--name", path.name, "--json", folder=tmp_path)
        finally:
            for each in _children(pid):
                os.kill(each, signal.SIGKILL)
    assert "3 leaked sockets from 1 place in 2 of 4 processes." in tree.stdout
    assert re.search(r"process  \d+ \(2\), \d+ \(1\)", tree.stdout)
    assert "no leaks" in alone.stdout
    assert alone.stdout.endswith("\nNot asked: 3 child processes (add --tree).\n")
    assert len(named.stdout.splitlines()) == 4


BY_MULTIPROCESSING = """
import multiprocessing, os, socket, time
kept = []

def work(address):
    kept.append(socket.create_connection(address))
    multiprocessing.parent_process().join(60)

if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as server:
        context = multiprocessing.get_context("{method}")
        context.Process(target=work, args=(server.getsockname(),), daemon=True).start()
        server.accept()[0].close()
        print(os.getpid(), flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_helpers_of_multiprocessing_are_not_asked_and_not_missed(tmp_path, method):
    path = tmp_path / "working.py"
    path.write_text(BY_MULTIPROCESSING.format(method=method))
    with running(str(path), tmp_path, command=RUN, stderr=subprocess.DEVNULL) as started:
        pid = int(line_of(started))
        eventually(lambda: len(list((tmp_path / "closewait_guard").iterdir())) == 2)
        eventually(lambda: "1 leaked" in ask(pid, "--tree", folder=tmp_path).stdout)
        tree, alone = ask(pid, "--tree", folder=tmp_path), ask(pid, folder=tmp_path)
    assert "1 leaked socket from 1 place in 1 of 2 processes." in tree.stdout
    assert tree.stderr == ""
    assert alone.stdout.endswith("\nNot asked: 1 child process (add --tree).\n")


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(number) for number in file.read().split()]


APPLICATION = """
import socket
server = socket.create_server(("127.0.0.1", 0))
kept = []

def app(environ, start_response):
    kept.append(socket.create_connection(server.getsockname()))
    server.accept()[0].close()
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""


@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent"])
def test_the_workers_of_gunicorn_answer_in_one_report(tmp_path, worker):
    (tmp_path / "served.py").write_text(APPLICATION)
    options = ("-w", "2", "-k", worker, "-b", f"unix:{tmp_path}/web", "--threads", "2")
    command = (*RUN, "--", "gunicorn", *options, "--chdir", str(tmp_path))
    with running("served:app", tmp_path, command=command, stderr=subprocess.DEVNULL) as started:
        master = started.pid
        try:
            eventually(lambda: len(_families(tmp_path)) >= 3)
            for _ in range(3):
                eventually(lambda: _is_served(tmp_path / "web"))
            text = ask(*_families(tmp_path), "--tree", folder=tmp_path).stdout
        finally:
            master = min(_families(tmp_path))
            os.kill(master, signal.SIGTERM)
            started.wait(DEADLINE)
    assert re.search(r"3 leaked sockets from 1 place in [12] of 3 processes\.", text)
    assert "served.py" in text
    assert "in app()" in text


def _families(folder):
    """The processes that answer."""
    with suppress(FileNotFoundError):
        return [int(path.name.partition("-")[0]) for path in (folder / "closewait_guard").iterdir()]
    return []


def _is_served(path):
    with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
        sock.connect(str(path))
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return b"200 OK" in sock.recv(4096)
    return False
