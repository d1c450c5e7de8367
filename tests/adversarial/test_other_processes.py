"""Processes that end, change or hide while they are looked at are neither blamed nor lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from closewait_guard import _processes
from closewait_guard._processes import linux, netlink, procfs
from closewait_guard.settings import Settings
from command_line import call, environment, program

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks the kernel")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do so")
needs_unshare = pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")
LISTENER = """
import os, socket, sys
os.system("ip link set lo up")
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
accepted, _ = server.accept()
print("ready", flush=True)
sys.stdin.read()
"""


def look(*pids, probe="auto", everything=False):
    scanner = _processes.ProcessScanner(Settings(probe=probe))
    return scanner.scan(list(pids) or None, everything=everything)


@contextmanager
def zombie():
    child = subprocess.Popen([sys.executable, "-Sc", ""])
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        yield child.pid
    finally:
        child.wait()


@pytest.mark.parametrize("probe", ["auto", "portable"])
def test_a_process_that_has_ended_gets_one_sentence(probe):
    with zombie() as pid:
        done = call("scan", pid, code=2, CLOSEWAIT_GUARD_PROBE=probe)
    assert done.stdout == ""
    assert done.stderr.startswith(f"closewait-guard: process {pid}")
    assert done.stderr.endswith(" has ended, and its parent has not waited for it\n")
    assert done.stderr.count("\n") == 1


def test_a_process_that_is_none_gets_one_sentence():
    with zombie() as pid:
        pass
    done = call("scan", pid, code=2)
    assert (done.stdout, done.stderr) == ("", f"closewait-guard: no such process: {pid}\n")


@pytest.mark.skipif(
    not Path("/proc/2/comm").exists() or Path("/proc/2/comm").read_text() != "kthreadd\n",
    reason="shows no threads of the kernel",
)
def test_a_thread_of_the_kernel_gets_one_sentence():
    done = call("scan", 2, code=2)
    assert done.stdout == ""
    assert done.stderr == (
        "closewait-guard: process 2 (kthreadd) is a kernel thread, and has no descriptors\n"
    )


def test_a_process_whose_first_thread_has_ended_is_not_called_healthy():
    source = """
import ctypes, socket, threading, time
kept = socket.socket()
def go_on():
    time.sleep(0.1)
    print("ready", flush=True)
    time.sleep(30)
threading.Thread(target=go_on).start()
ctypes.CDLL(None).syscall(60, 0)
"""
    if os.uname().machine != "x86_64":
        pytest.skip("the number of exit() is that of x86_64")
    with program(source) as running:
        found = look(running.pid)
        os.kill(running.pid, signal.SIGKILL)
    [refusal] = found.inaccessible
    assert refusal.why == "continues without its main thread, so that /proc shows nothing"
    assert not found.processes


def test_a_number_that_has_passed_to_another_process_meanwhile_is_not_mixed_up(monkeypatch):
    true, asked = procfs._status, []

    def started_again(pid):
        asked.append(pid)
        return true(pid)._replace(started=len(asked))

    monkeypatch.setattr(procfs, "_status", started_again)
    with pytest.raises(ProcessLookupError):
        procfs.read(os.getpid())
    found = look(os.getpid())
    assert not found.processes
    assert [each.exists for each in found.inaccessible] == [False]


def test_a_process_that_is_replaced_between_two_steps_of_a_look_is_left_out(monkeypatch):
    answers = iter([True, False])
    monkeypatch.setattr(procfs, "has_stayed", lambda process: next(answers))
    found = look(os.getpid())
    assert not found.processes
    assert [each.exists for each in found.inaccessible] == [False]


def test_a_descriptor_that_is_another_socket_by_now_is_not_reported(monkeypatch):
    with socket.socket() as sock:
        [before] = look(os.getpid()).processes
        assert before.states["CLOSE"] >= 1
        true = procfs.descriptors_of_process

        def of_a_moment_ago(pid):
            sockets, descriptors = true(pid)
            return {**sockets, sock.fileno(): 1}, descriptors

        monkeypatch.setattr(procfs, "descriptors_of_process", of_a_moment_ago)
        [after] = look(os.getpid()).processes
    assert after.states.get("CLOSE", 0) == before.states["CLOSE"] - 1


@pytest.mark.parametrize(
    "name",
    [
        b"\0one\ntwo",
        b"\0a\r0: 00000002 00000000 00010000 0001 01 7 /x",
        b"\0\n0: 00000002 00000000 00010000 0001 01 7777777777 /forged",
        b"\0) (\x1b[31m\xff",
    ],
)
def test_a_unix_socket_s_name_is_no_further_line_of_the_table(name):
    with socket.socket(socket.AF_UNIX) as hostile, socket.socket(socket.AF_UNIX) as plain:
        plain.bind(f"\0closewait-guard-{os.getpid()}")
        hostile.bind(name)
        found = look(os.getpid(), everything=True)
    [process] = found.processes
    locals_ = [each.local for each in process.report.observations if each.family == "AF_UNIX"]
    assert f"@closewait-guard-{os.getpid()}" in locals_


def test_a_forged_line_gives_no_other_socket_an_address():
    with socket.socket(socket.AF_UNIX) as victim, socket.socket(socket.AF_UNIX) as hostile:
        victim.bind(f"\0closewait-guard-{os.getpid()}")
        inode = os.fstat(victim.fileno()).st_ino
        line = f"\0\n0: 00000002 00000000 00010000 0001 01 {inode} /forged"
        hostile.bind(line)
        assert procfs.local_addresses(os.getpid())[inode] == (None, None)


# As nobody, who may not read where Python is installed: what is needed is imported before. heapq is
# needed only if there are sockets of other processes at that moment.
HIDDEN = """
import contextlib, heapq, io, os, subprocess, sys, pwd
from closewait_guard.commands import main
subprocess.run(["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"], check=True)
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    main(["scan"])
    main(["scan", "999999"])
    main(["scan", str(os.getpid())])
other = subprocess.Popen([sys.executable, "-Sc", "import time; time.sleep(30)"])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(main(["scan", str(other.pid)]), other.pid)
main(["scan"])
sys.stdout.flush()
os._exit(0)
"""


@needs_root
@needs_unshare
def test_processes_that_are_hidden_are_said_to_be_so():
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", sys.executable, "-c", HIDDEN],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    assert "Traceback" not in done.stderr, done.stderr
    code, pid = done.stdout.split()[:2]
    assert code == "2"
    assert done.stderr == (
        f"closewait-guard: not permitted to inspect process {pid} of user unknown: run as root, "
        "or as that user\n"
    )
    assert "Processes of other users are hidden here: /proc is mounted with hidepid" in " ".join(
        done.stdout.split()
    )


@needs_root
@needs_unshare
def test_a_network_whose_first_process_ends_is_seen_through_another(monkeypatch):
    with program(LISTENER, prefix=["unshare", "--net"]) as running:
        home = procfs.namespace_of(running.pid)
        true = linux.network_of

        def after_the_first_has_ended(home_, pids, wanted, *, dated):
            gone = [1 << 22, *pids] if home_ == home else pids
            return true(home_, gone, wanted, dated=dated)

        monkeypatch.setattr(linux, "network_of", after_the_first_has_ended)
        [process] = look(running.pid).processes
    assert process.states == {"LISTEN": 1, "ESTABLISHED": 2}


@needs_root
@needs_unshare
def test_a_network_that_cannot_be_looked_at_reports_no_leak_and_is_said(monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(netlink, "_open_within", refused)
    monkeypatch.setattr(procfs, "table", refused)
    with program(LISTENER, prefix=["unshare", "--net"]) as running:
        found = look(running.pid)
        everybody = look()
    assert not found.processes
    assert [each.why for each in found.inaccessible] == [
        "is in a network namespace that cannot be inspected"
    ]
    text = " ".join(_processes.render_processes(everybody, only=()).split())
    assert "that is in a network namespace that cannot be inspected." in text


def test_a_process_that_fails_for_another_reason_than_rights_is_said(monkeypatch):
    true = procfs.descriptors_of_process

    def without_descriptors(pid):
        if pid == os.getpid():
            raise OSError(errno.EMFILE, "Too many open files")
        return true(pid)

    monkeypatch.setattr(procfs, "descriptors_of_process", without_descriptors)
    text = " ".join(_processes.render_processes(look(), only=()).split())
    assert "Not looked into: 1 process that cannot be looked into: Too many open files." in text


def test_a_process_that_ends_while_it_is_refused_is_none(monkeypatch):
    with zombie() as pid:
        pass

    def refuse(number):
        raise PermissionError(number)

    monkeypatch.setattr(procfs, "read", refuse)
    assert [each.exists for each in look(pid).inaccessible] == [False]


@pytest.mark.parametrize("name", ["a) R 1 (b", "two\nlines", ") Z 9 9 ("])
def test_a_name_with_brackets_and_newlines_hides_no_parent(name):
    source = (
        "import ctypes, sys\n"
        f"ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)\n"
        "print('ready', flush=True)\nsys.stdin.read()"
    )
    with program(source) as running:
        [process] = look(running.pid).processes
        assert procfs.read(running.pid).parent == os.getpid()
    assert process.report.pid == running.pid
