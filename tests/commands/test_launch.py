"""`run --fail-on-leak`: the launcher waits, and the program gets each signal once."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from command_line import COMMAND, Terminal, environment

RUN = [*COMMAND, "run", "--no-at-exit", "--fail-on-leak"]

# Says which signals have come, until its stdin ends.
LISTENS = r"""
import os, signal, sys
ignored = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE}
for number in signal.valid_signals() - ignored:
    signal.signal(number, lambda number, _: os.write(1, b"got %d\n" % number))
os.write(1, b"%d\n" % os.getpid())
sys.stdin.read()
"""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="it needs /proc")


@contextmanager
def running(path, **options):
    """The launcher of a program, and the program's number, which it has printed."""
    with subprocess.Popen(
        [*RUN, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
        start_new_session=True,
        **options,
    ) as launcher:
        # What never comes must not hold up the tests.
        limit = threading.Timer(60, os.killpg, (launcher.pid, signal.SIGKILL))
        limit.start()
        try:
            yield launcher, int(launcher.stdout.readline())
        finally:
            limit.cancel()
            limit.join()
            launcher.kill()
            launcher.stdin.close()


@pytest.fixture
def listening(tmp_path):
    path = tmp_path / "listens.py"
    path.write_text(LISTENS)
    return path


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_taken_all(pid):
    """Whether no signal is pending: those that are equal are one to the kernel."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return not any(pending)


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def waits_for_signals(pid):
    """Whether it has handled all: where the system does not say what it waits for, it may not."""
    waits_for = Path(f"/proc/{pid}/wchan").read_text()
    return (
        has_taken_all(pid)
        and state_of(pid) == "S"
        and ("sigtimedwait" in waits_for or waits_for == "0")
    )


def is_stopped(pid):
    return state_of(pid) == "T"


def end(launcher):
    """What the program has printed since, and how the launcher has ended."""
    rest, _ = launcher.communicate(timeout=20)
    return rest, launcher.returncode


@LINUX
def test_a_signal_to_the_process_group_reaches_the_program_once(listening):
    with running(listening) as (launcher, _):
        got, expected = [], []
        # One that came twice would stand before the next.
        for send, number in (
            (os.killpg, signal.SIGTERM),
            (os.kill, signal.SIGUSR1),
            (os.kill, signal.SIGTERM),
            (os.killpg, signal.SIGUSR1),
            (os.killpg, signal.SIGINT),
            (os.kill, signal.SIGPROF),
            (os.killpg, signal.SIGRTMIN),
            (os.kill, signal.SIGRTMIN + 1),
        ):
            # The program has its own at once. A second one while the first is pending is none.
            until(lambda: has_taken_all(launcher.pid))
            send(launcher.pid, number)
            expected.append(f"got {number:d}\n")
            got.append(launcher.stdout.readline())
        assert got == expected
        assert end(launcher) == ("", 0)


@LINUX
def test_a_signal_to_the_launchers_name_reaches_the_program(listening):
    with running(listening) as (launcher, program):
        named = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if f"{listening}".encode() in read(path) and b"--fail-on-leak" in read(path)
        ]
        assert named == [launcher.pid]
        os.kill(named[0], signal.SIGTERM)
        assert launcher.stdout.readline() == f"got {signal.SIGTERM:d}\n"
        assert end(launcher) == ("", 0)


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def children_of(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@LINUX
def test_a_signal_to_every_process_of_a_tree_reaches_the_program_once(listening):
    with running(listening) as (launcher, _):
        for pid in [launcher.pid, *children_of(launcher.pid)]:
            os.kill(pid, signal.SIGTERM)
        assert launcher.stdout.readline() == f"got {signal.SIGTERM:d}\n"
        os.kill(launcher.pid, signal.SIGWINCH)
        assert launcher.stdout.readline() == f"got {signal.SIGWINCH:d}\n"
        assert end(launcher) == ("", 0)


@LINUX
def test_what_is_sent_to_the_launcher_and_then_to_its_group_reaches_the_program_once(listening):
    """As `timeout` does."""
    with running(listening) as (launcher, _):
        os.kill(launcher.pid, signal.SIGINT)
        os.killpg(launcher.pid, signal.SIGINT)
        assert launcher.stdout.readline() == f"got {signal.SIGINT:d}\n"
        os.kill(launcher.pid, signal.SIGWINCH)
        assert launcher.stdout.readline() == f"got {signal.SIGWINCH:d}\n"
        assert end(launcher) == ("", 0)


@LINUX
def test_what_came_to_the_children_only_does_not_keep_a_later_signal_from_the_program(listening):
    with running(listening) as (launcher, program):
        others = [pid for pid in children_of(launcher.pid) if pid != program]
        assert others
        for pid in others:
            os.kill(pid, signal.SIGTERM)
        time.sleep(2.5)
        os.kill(launcher.pid, signal.SIGTERM)
        assert launcher.stdout.readline() == f"got {signal.SIGTERM:d}\n"
        assert end(launcher) == ("", 0)


@LINUX
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_signal_reaches_the_program_where_the_other_process_cannot_answer(listening, number):
    with running(listening) as (launcher, program):
        for pid in children_of(launcher.pid):
            if pid != program:
                os.kill(pid, number)
        os.kill(launcher.pid, signal.SIGTERM)
        assert launcher.stdout.readline() == f"got {signal.SIGTERM:d}\n"
        assert end(launcher) == ("", 0)


@LINUX
def test_a_launcher_that_is_killed_leaves_no_process_but_the_program(listening):
    with running(listening) as (launcher, program):
        (other,) = [pid for pid in children_of(launcher.pid) if pid != program]
        launcher.kill()
        launcher.wait(20)
        until(lambda: not Path(f"/proc/{other}").exists() or state_of(other) == "Z")
        assert not is_stopped(program)


@LINUX
def test_the_launcher_stops_and_continues_with_the_program(tmp_path):
    """As by Ctrl-Z, here to the launcher alone, as a shell sees it."""
    path = tmp_path / "program.py"
    path.write_text("import os\nprint(os.getpid(), flush=True)\ninput()\nprint('done')")
    # In a session of its own no process could be stopped by SIGTSTP.
    with subprocess.Popen(
        [*RUN, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True
    ) as launcher:
        try:
            program = int(launcher.stdout.readline())
            for _ in range(3):
                # What comes while it still hands on SIGCONT is taken back by that.
                until(lambda: waits_for_signals(launcher.pid))
                launcher.send_signal(signal.SIGTSTP)
                until(lambda: is_stopped(launcher.pid))
                _, status = os.waitpid(launcher.pid, os.WUNTRACED)
                assert os.WIFSTOPPED(status)
                assert os.WSTOPSIG(status) == signal.SIGTSTP
                assert is_stopped(program)
                launcher.send_signal(signal.SIGCONT)
                until(lambda: not is_stopped(launcher.pid) and not is_stopped(program))
            out, _ = launcher.communicate("\n", timeout=20)
            assert (out, launcher.returncode) == ("done\n", 0)
        finally:
            # Where stops are ignored it would wait for its input.
            launcher.kill()


def test_a_program_that_a_tool_stops_alone_is_continued_alone(tmp_path):
    path = tmp_path / "program.py"
    path.write_text("import os\nprint(os.getpid(), flush=True)\ninput()\nprint('done')")
    with running(path) as (launcher, program):
        os.kill(program, signal.SIGSTOP)
        if sys.platform == "linux":
            until(lambda: is_stopped(program))
            until(lambda: has_taken_all(launcher.pid))
        os.kill(program, signal.SIGCONT)
        out, _ = launcher.communicate("\n", timeout=20)
        assert (out, launcher.returncode) == ("done\n", 0)


JOB = """
import signal, sys
signal.signal(signal.SIGCONT, lambda *_: print("continued", flush=True))
print("up", flush=True)
print("read", sys.stdin.readline())
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="it needs bash")
@pytest.mark.parametrize("options", [[], ["--fail-on-leak"]])
def test_a_shell_stops_and_continues_the_program_as_a_job(tmp_path, options):
    path = tmp_path / "program.py"
    path.write_text(JOB)
    job = shlex.join(map(str, [*COMMAND, "run", "--no-at-exit", *options, path]))
    with Terminal("bash", "--norc", "--noprofile", "-i", PS1="ready$ ", columns=200) as terminal:
        terminal.until("ready$")
        terminal.type(f"{job}\n")
        terminal.until("\nup")
        for times in (1, 2):
            terminal.type("\x1a")
            terminal.until(lambda text, times=times: text.count("Stopped") == times)
            terminal.type("fg\n")
            # A second SIGCONT for one `fg` was seen on a busy machine: it continues what runs.
            terminal.until(lambda text, times=times: text.count("continued") >= times)
        terminal.type("line\n")
        terminal.until("read line")
        terminal.type("echo status $?\n")
        terminal.until("status 0")
        terminal.type("exit\n")
        assert terminal.wait() == 0


def test_a_program_is_waited_for_where_the_ends_of_children_are_ignored(tmp_path):
    path = tmp_path / "program.py"
    path.write_text("import signal, sys\nsys.exit(signal.getsignal(signal.SIGCHLD))")
    source = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""
    command = [sys.executable, "-c", source, *RUN, path]
    with subprocess.Popen(command, env=environment()) as launcher:
        try:
            # It is ignored in the program, too.
            assert launcher.wait(20) == signal.SIG_IGN
        finally:
            launcher.kill()
