"""A process answers those who may ask, whatever it does itself, and is not changed by that."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

import closewait_guard as cwg
from closewait_guard._remote import Listener, MessageSocket, RemoteError, ask_control
from closewait_guard._remote.place import folder_of_this_user, name_of, remove_stale
from closewait_guard._threads import waiting_calls_of
from remote.programs import DEADLINE, INSTALL, LEAK, STUCK, eventually, line_of, report_of, running


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the control sockets of this process lie."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "closewait_guard"


@pytest.fixture
def path(folder):
    """That of this process, which answers."""
    cwg.install(control=True, grace=0)
    yield folder / name_of("self")
    cwg.uninstall()


def exchange(path, sent):
    """What a process answers to some bytes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(str(path))
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def threads():
    """Of this process, as the system knows them."""
    return os.listdir("/proc/self/task")


def test_a_process_that_is_stuck_in_c_answers_with_line_and_holder(tmp_path):
    with running(INSTALL + LEAK + STUCK, tmp_path) as program:
        pid = int(line_of(program))
        [finding] = report_of(pid)["findings"]
    assert finding["verdict"] == "leaked"
    stack = finding["observation"]["record"]["stack"]
    assert any(frame["function"] == "<module>" for frame in stack)
    assert any("kept" in holder for holder in finding["holders"])


def test_without_being_asked_for_it_no_process_listens(folder):
    cwg.install()
    before = threads()
    assert not folder.exists()
    cwg.uninstall()
    assert len(before) == len(threads())


def test_after_uninstall_nothing_is_left(folder):
    before = threads(), os.listdir("/proc/self/fd")
    cwg.install(control=True)
    assert [path.name for path in folder.iterdir()] == [name_of("self")]
    assert len(threads()) == len(before[0]) + 1
    cwg.uninstall()
    assert list(folder.iterdir()) == []
    assert (threads(), os.listdir("/proc/self/fd")) == before


def test_a_program_that_ends_leaves_no_file(tmp_path):
    with running(INSTALL + "input()", tmp_path, stdin=subprocess.PIPE) as program:
        folder = tmp_path / "closewait_guard"
        eventually(lambda: folder.exists() and list(folder.iterdir()))
        program.stdin.close()
        program.wait(DEADLINE)
        assert list(folder.iterdir()) == []


def test_neither_the_thread_nor_a_descriptor_of_it_is_one_of_the_programs(path):
    assert "closewait" not in str(threading.enumerate())
    began = cwg.scan(full=True)
    with cwg.no_leaks(descriptors=True):
        report_of(os.getpid())
    report = cwg.scan(full=True)
    assert report.open_sockets == began.open_sockets
    assert report.findings == began.findings
    assert not [each for each in report.observations if each.local and str(path) in each.local]


def test_from_outside_it_does_not_look_as_if_it_might_be_using_every_descriptor(tmp_path):
    with running(INSTALL + LEAK + STUCK, tmp_path) as program:
        pid = int(line_of(program))
        eventually(lambda: not waiting_calls_of(pid).may_use_others)


def test_a_watch_can_have_it_too(folder):
    with cwg.watch(control=True, at_exit=False, reporters=[lambda report: None]):
        assert report_of(os.getpid())["pid"] == os.getpid()
    cwg.uninstall()


@pytest.mark.parametrize("sent", [b"", b"{", b"\n", b"[]\n", b"{}\n", b'{"request": "exit"}\n'])
def test_what_is_no_request_is_refused_in_a_sentence(path, sent):
    assert exchange(path, sent).startswith(b'{"error":"')
    assert report_of(os.getpid())["pid"] == os.getpid()


def test_a_huge_request_is_not_read(path):
    with suppress(ConnectionError):
        assert b"more than 4,096 bytes" in exchange(path, b"x" * 10_000)
    assert report_of(os.getpid())["pid"] == os.getpid()


def test_a_caller_that_says_nothing_keeps_others_waiting_for_a_second(path):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(path))
        assert report_of(os.getpid())["pid"] == os.getpid()


def test_a_failure_is_said_to_the_caller(path, monkeypatch):
    monkeypatch.setattr(cwg.Guard, "scan", lambda _: 1 / 0)
    with pytest.raises(RemoteError, match="could not do it: ZeroDivisionError: division by zero"):
        report_of(os.getpid())


def test_reports_at_intervals_begin_and_end_by_request(tmp_path):
    with running(INSTALL + LEAK + STUCK, tmp_path, stderr=subprocess.PIPE) as program:
        pid = int(line_of(program))
        with pytest.raises(RemoteError, match="interval: expected a positive number of seconds"):
            ask_control(pid, {"request": "start", "interval": 0}, DEADLINE)
        assert ask_control(pid, {"request": "start", "interval": 0.1}, DEADLINE) == {
            "done": "start"
        }
        with pytest.raises(RemoteError, match="it prints reports at intervals already"):
            ask_control(pid, {"request": "start", "interval": 1}, DEADLINE)
        assert program.stderr.readline().startswith("closewait-guard")
        assert ask_control(pid, {"request": "stop"}, DEADLINE) == {"done": "stop"}
        with pytest.raises(RemoteError, match="it prints no reports at intervals"):
            ask_control(pid, {"request": "stop"}, DEADLINE)


def test_a_fork_answers_for_itself(path):
    pid = fork_beside_threads_of_other_tests()
    if not pid:
        with suppress(BaseException):
            time.sleep(DEADLINE)
        os._exit(0)
    try:
        assert report_of(pid)["pid"] == pid
        assert report_of(os.getpid())["pid"] == os.getpid()
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    remove_stale(str(path.parent))
    assert list(path.parent.iterdir()) == [path]


def test_python_warns_of_no_thread_at_a_fork(tmp_path):
    code = f"""
{INSTALL}
import os, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)
print("forked", len(caught), flush=True)
"""
    with running(code, tmp_path) as program:
        assert line_of(program) == "forked 0"


def test_a_child_that_ends_at_once_leaves_no_file(path):
    pid = fork_beside_threads_of_other_tests()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    assert list(path.parent.iterdir()) == [path]


def fork_beside_threads_of_other_tests():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def test_a_daemon_that_forks_twice_and_closes_all_descriptors_is_heard(tmp_path):
    code = f"""
{INSTALL}{LEAK}
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
out = os.dup(1)
os.closerange(0, 3)
os.closerange(3, out), os.closerange(out + 1, 4096)
assert [os.open(os.devnull, os.O_RDWR) for _ in range(3)] == [0, 1, 2]
kept = [socket.create_server(("127.0.0.1", 0))]
kept.append(socket.create_connection(kept[0].getsockname()))
kept[0].accept()[0].close()
os.write(out, b"%d\\n" % os.getpid())
kept[0].accept()
"""
    with running(code, tmp_path) as program:
        pid = int(line_of(program))
        try:
            eventually(lambda: _answers(pid))
            verdicts = [each["verdict"] for each in report_of(pid)["findings"]]
        finally:
            os.kill(pid, 9)
    assert verdicts.count("leaked") == 1


@pytest.mark.parametrize(
    ("library", "patch"),
    [
        ("gevent", "from gevent import monkey; monkey.patch_all()"),
        ("eventlet", "import eventlet; eventlet.monkey_patch()"),
    ],
)
def test_a_program_of_green_threads_goes_on_while_it_waits_for_those_who_ask(
    tmp_path, library, patch
):
    pytest.importorskip(library)
    code = f"""
import faulthandler
faulthandler.dump_traceback_later({DEADLINE}, exit=True)
{patch}
{INSTALL}{LEAK}
ticks = 0
print(os.getpid(), flush=True)
while ticks < 50:
    time.sleep(0.01)
    ticks += 1
print("ticks", flush=True)
# gevent learns of a child's end by a signal, and misses one that comes before it watches.
if not (child := os.fork()):
    time.sleep(0.3)
    os._exit(0)
os.waitpid(child, 0)
print("waited", flush=True)
time.sleep(60)
"""
    with running(code, tmp_path, stderr=subprocess.DEVNULL) as program:
        pid = int(line_of(program))
        assert [each["verdict"] for each in report_of(pid)["findings"]] == ["leaked"]
        assert line_of(program) == "ticks"
        assert line_of(program) == "waited"
        assert report_of(pid)["pid"] == pid
        program.terminate()
        assert program.wait(DEADLINE) == -signal.SIGTERM


def test_a_program_that_closes_all_descriptors_keeps_its_files_and_is_heard_again(tmp_path):
    code = f"""
{INSTALL}{LEAK}
os.closerange(3, 4096)
kept = None
files = [open({str(tmp_path)!r} + "/file", "ab") for _ in range(200)]
print(os.getpid(), flush=True)
sys.stdin.readline()
for file in files:
    file.write(b"x")
    file.close()
"""
    with running(code, tmp_path, stdin=subprocess.PIPE) as program:
        pid = int(line_of(program))
        eventually(lambda: _answers(pid))
        program.communicate("\n", DEADLINE)
        assert program.returncode == 0
    assert (tmp_path / "file").read_bytes() == b"x" * 200


def _answers(pid):
    try:
        return report_of(pid)["pid"] == pid
    except RemoteError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
def test_a_program_that_changes_its_user_is_heard_as_that_user(tmp_path):
    user = 54321
    code = f"{INSTALL}{LEAK}os.setgid({user}); os.setuid({user}){STUCK}"
    with running(code, tmp_path) as program:
        pid = int(line_of(program))
        folder = Path(f"/tmp/closewait_guard-{user}")
        eventually(folder.exists)
        eventually(lambda: _answers(pid))
        assert folder.stat().st_uid == user
        program.kill()
        program.wait()
    remove_stale(str(folder))
    folder.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
def test_another_user_is_not_answered(path):
    path.chmod(0o777)
    for folder in path.parents:
        if folder.is_relative_to(tempfile.gettempdir()) and str(folder) != tempfile.gettempdir():
            folder.chmod(0o755)
    code = f"""
import os, socket
os.setgid(54321); os.setuid(54321)
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(10)
sock.connect({str(path)!r})
try:
    sock.sendall(b'{{"request": "report"}}' + bytes([10]))
    print(sock.recv(10))
except ConnectionError as error:
    print(b"")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    path.parent.chmod(0o700)
    assert done.stdout == "b''\n"
    assert report_of(os.getpid())["pid"] == os.getpid()


def test_at_the_limit_of_descriptors_it_answers(tmp_path):
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
{INSTALL}{LEAK}
copies = []
try:
    while True:
        copies.append(os.dup(1))
except OSError:
    print(os.getpid(), flush=True)
    time.sleep(60)
"""
    with running(code, tmp_path) as program:
        report = report_of(int(line_of(program)))
    # What the guard keeps for this is in use for the answer.
    assert report["fd_limit"] == 100
    assert report["fd_used"] >= 98
    assert [each["verdict"] for each in report["findings"]] == ["leaked"]


@pytest.mark.parametrize("what", ["link", "mode", "file"])
def test_a_folder_that_others_may_use_is_not_used_and_that_is_said(folder, tmp_path, what):
    if what == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif what == "mode":
        folder.mkdir()
        folder.chmod(0o755)
    else:
        folder.write_bytes(b"")
    why = "has mode 755 instead of 700" if what == "mode" else "is not a folder"
    with pytest.warns(RuntimeWarning, match=f"no control socket: .*closewait_guard {why}"):
        cwg.install(control=True)
    assert cwg.scan().open_sockets >= 0
    cwg.uninstall()
    gc.collect()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner")
def test_a_folder_of_another_user_is_not_used(folder):
    folder.mkdir(mode=0o700)
    os.chown(folder, 54321, -1)
    with pytest.raises(RemoteError, match="belongs to user 54321"):
        folder_of_this_user()


def test_a_mask_of_the_program_does_not_take_the_folder_from_it(folder):
    mask = os.umask(0o777)
    try:
        cwg.install(control=True)
    finally:
        os.umask(mask)
    assert report_of(os.getpid())["pid"] == os.getpid()
    cwg.uninstall()


def test_sockets_of_processes_that_have_ended_are_removed_and_no_others(folder):
    folder = folder_of_this_user()
    # Of another namespace, where this process cannot see who has that number.
    with Listener(f"{folder}/4194999-1"):
        Listener(f"{folder}/4194998-1").close_copy()
        Path(folder, "note").write_bytes(b"")
        cwg.install(control=True)
        assert sorted(os.listdir(folder)) == sorted(["4194999-1", name_of("self"), "note"])
        cwg.uninstall()


def test_what_answers_in_the_place_of_a_process_is_not_believed(folder, tmp_path):
    with running("input()", tmp_path, stdin=subprocess.PIPE) as program:
        with Listener(f"{folder_of_this_user()}/{name_of(program.pid)}"):
            with pytest.raises(RemoteError, match=f"instead of process {program.pid}"):
                report_of(program.pid)


def test_a_process_that_does_not_answer_is_waited_for_no_longer_than_allowed(folder):
    with Listener(f"{folder_of_this_user()}/{name_of('self')}"):
        with pytest.raises(RemoteError, match=r"did not answer within 0\.2 s"):
            ask_control(os.getpid(), {"request": "report"}, 0.2)


@pytest.mark.parametrize("reply", [b"", b"{", b"x\n", b'{"report": 1}'])
def test_a_reply_that_is_none_is_said_to_be(folder, reply):
    with Listener(f"{folder_of_this_user()}/{name_of('self')}") as listener:

        def answer():
            with (
                listener.accept(DEADLINE) as caller,
                socket.socket(fileno=os.dup(caller.fileno())) as sock,
            ):
                sock.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RemoteError, match=f"^process {os.getpid()}: the other process "):
            report_of(os.getpid())
        thread.join()


def test_what_cannot_be_asked_is_said_in_one_sentence(folder):
    with pytest.raises(RemoteError, match=r"^no such process: 4194999$"):
        report_of(4194999)
    with pytest.raises(RemoteError, match=f"^process {os.getpid()} has no control socket: start"):
        report_of(os.getpid())


def test_message_sockets_of_a_report_are_closed(path):
    report_of(os.getpid())
    many = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        report_of(os.getpid())
    with MessageSocket.to(str(path), DEADLINE):
        pass
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= many)


def test_one_connection_is_one_request(path):
    assert exchange(path, b'{"request": "stop"}\n' * 2).count(b"\n") == 1
