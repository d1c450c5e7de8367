"""`watch`: what `scan` sees, again and again, on a terminal and on a pipe."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time

import pytest

from closewait_guard.commands._watch_state import sparkline
from command_line import (
    ANSWERS_KEEPALIVES,
    COMMAND,
    WAIT,
    Terminal,
    call,
    environment,
    program,
)

WATCH = [*COMMAND, "watch", "--interval", "0.3"]

# One more connection in CLOSE_WAIT for each line on stdin, with what the line says unread.
GROWING = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
kept = []
print(server.getsockname()[1], flush=True)
for line in sys.stdin:
    kept.append(socket.create_connection(server.getsockname()))
    accepted, _ = server.accept()
    accepted.sendall(line.strip().encode())
    accepted.close()
"""


def grow(running, times=1, unread="more"):
    running.stdin.write(f"{unread}\n" * times)
    running.stdin.flush()


@pytest.fixture
def growing():
    with program(GROWING) as running:
        yield running


def states(text):
    """The numbers beside the states on the screen."""
    words = [line.split() for line in text.splitlines()]
    return {line[0]: int(line[1]) for line in words if len(line) > 2 and line[1].isdecimal()}


def test_it_draws_states_with_their_history_and_the_worst_offenders(growing):
    grow(growing, 3)
    with Terminal(*WATCH, str(growing.pid), CLOSEWAIT_GUARD_GRACE="0.1") as terminal:
        text = terminal.until(lambda text: states(text).get("CLOSE_WAIT") == 3 and "leaked" in text)
        assert text.startswith("closewait-guard watch  ")
        assert "q quits" in text
        assert "4 sockets in 1 process" in text
        assert any(bar in text for bar in "▁▂▃▄▅▆▇█")
        assert f"to 127.0.0.1:{growing.first_line}" in text
        assert str(growing.pid) in text
        assert all(len(line) <= 80 for line in text.splitlines())
        terminal.type("q")
        assert terminal.wait() == 0


def test_a_narrow_terminal_shows_fewer_columns_rather_than_parts_of_all(growing):
    grow(growing, 3)
    narrow = {"columns": 60, "CLOSEWAIT_GUARD_GRACE": "0.1"}
    with Terminal(*WATCH, str(growing.pid), **narrow) as terminal:
        text = terminal.until("leaked")
        assert re.search(r"PROGRAM +PID +COUNT +VERDICT +PEER +SINCE$", text, re.MULTILINE), text
        assert re.search(rf"leaked +to 127\.0\.0\.1:{growing.first_line} +[\d<]", text), text
        terminal.type("q")
        assert terminal.wait() == 0


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="asks the kernel of Linux")
def test_an_age_that_is_a_lower_bound_says_so():
    with (
        program(ANSWERS_KEEPALIVES) as running,
        Terminal(*WATCH, str(running.pid), CLOSEWAIT_GUARD_GRACE="0.1") as terminal,
    ):
        terminal.until(lambda text: re.search(r" at least \d[.\d]* s", text))
        terminal.type("q")
        assert terminal.wait() == 0


def test_changes_are_highlighted(growing):
    grow(growing)
    with Terminal(*WATCH, str(growing.pid)) as terminal:
        terminal.until(lambda text: states(text).get("CLOSE_WAIT") == 1)
        grow(growing, 2)
        terminal.until("+2")
        rows = terminal.screen.buffer
        changed = [cell for row in rows.values() for cell in row.values() if cell.reverse]
        assert "+2" in "".join(cell.data for cell in changed)
        # With nothing new, nothing is highlighted.
        terminal.until(lambda text: "+2" not in text)
        terminal.type("q")
        assert terminal.wait() == 0


@pytest.mark.parametrize(("typed", "code"), [("q", 0), ("\x03", 130)])
def test_it_leaves_the_terminal_as_it_was(growing, typed, code):
    # The shell itself is not to end by Ctrl-C before it has printed.
    script = 'trap : INT; stty -g; "$0" "$@"; echo "code $?"; stty -g'
    with Terminal("sh", "-c", script, *WATCH, str(growing.pid)) as terminal:
        terminal.until("q quits")
        terminal.type(typed)
        assert terminal.wait() == 0
    assert b"Traceback" not in terminal.raw
    shown, hidden = b"\x1b[?25h", b"\x1b[?1049l"
    assert shown in terminal.raw
    before, *_ = terminal.raw.split(b"\r\n")
    after = terminal.raw.rpartition(hidden)[2].replace(shown, b"").replace(b"^C", b"")
    assert after.split() == [b"code", b"%d" % code, before]


def test_it_follows_the_size_of_the_window(growing):
    grow(growing)
    with Terminal(*WATCH, "--interval", "60", str(growing.pid)) as terminal:
        terminal.until("q quits")
        terminal.resize(50, 12)
        terminal.screen.reset()
        # Long before the next look.
        text = terminal.until("CLOSE_WAIT", seconds=5)
        assert all(len(line) <= 50 for line in text.splitlines())
        terminal.type("q")
        assert terminal.wait() == 0


def test_termination_leaves_the_terminal_as_it_was(growing):
    with Terminal(*WATCH, str(growing.pid)) as terminal:
        terminal.until("q quits")
        terminal.process.terminate()
        assert terminal.wait() == 128 + signal.SIGTERM
        assert b"\x1b[?1049l" in terminal.raw


def test_on_a_pipe_each_look_is_one_line(growing):
    grow(growing, 2)
    time.sleep(0.2)
    done = call(
        "watch", "--interval", "0.2", "--count", "3", growing.pid, code=0, CLOSEWAIT_GUARD_GRACE="0"
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert "CLOSE_WAIT 2  LISTEN 1" in line
        assert f"worst: 2 leaked to 127.0.0.1:{growing.first_line}" in line
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def last_line(running):
    time.sleep(0.2)
    arguments = ["--count", "1", running.pid]
    return call("watch", *arguments, code=0, CLOSEWAIT_GUARD_GRACE="0").stdout


def test_what_an_idle_pool_may_hold_is_counted_apart_until_there_is_too_much_of_it(growing):
    peer = f"to 127.0.0.1:{growing.first_line}"
    grow(growing, 10, unread="")
    assert f"worst: 10 idle or leaked {peer}" in last_line(growing)
    grow(growing, 1, unread="")
    assert f"worst: 11 leaked {peer}" in last_line(growing)


def test_a_leak_is_worse_than_what_an_idle_pool_may_hold(growing):
    grow(growing, 2, unread="")
    grow(growing, 1)
    assert "worst: 1 leaked " in last_line(growing)


def test_on_a_dumb_terminal_each_look_is_one_line(growing):
    dumb = ["env", "TERM=dumb", *WATCH, "--count", "2", str(growing.pid)]
    with Terminal(*dumb) as terminal:
        assert terminal.wait() == 0
        assert b"\x1b" not in terminal.raw
        assert terminal.raw.count(b"LISTEN 1") == 2


def test_it_ends_with_the_last_of_its_processes(growing):
    command = [*WATCH, str(growing.pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as watching:
        watching.stdout.readline()
        growing.stdin.close()
        growing.wait(10)
        assert watching.wait(10) == 0


def test_a_socket_without_a_connection_is_reported_once_it_has_been_so_for_long():
    """The kernel does not date it; looking again and again does."""
    source = "import socket, sys\nserver = socket.create_server(('127.0.0.1', 0))\n"
    with program(source + "never = socket.socket()\n" + WAIT) as running:
        lines = call(
            "watch",
            "--interval",
            "0.3",
            "--count",
            "3",
            running.pid,
            code=0,
            CLOSEWAIT_GUARD_GRACE="0.2",
        ).stdout.splitlines()
    assert lines[0].endswith("no leaks")
    assert "worst: 1 dead" in lines[-1]


def test_without_rich_the_terminal_gets_one_sentence(tmp_path, growing):
    (tmp_path / "rich.py").write_text("raise ImportError('not here')")
    with Terminal(*WATCH, str(growing.pid), PYTHONPATH=str(tmp_path)) as terminal:
        assert terminal.wait() == 2
        assert "pip install 'closewait-guard[cli]'" in " ".join(terminal.text().split())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--interval", "0"], "expected a number of seconds from 0.1 to 86,400, got '0'"),
        (["--interval", "nan"], "expected a number of seconds from 0.1 to 86,400, got 'nan'"),
        (["--count", "-1"], "expected a positive integer, got '-1'"),
        (["--count", "1.5"], "expected a positive integer, got '1.5'"),
        (["999999999"], "no such process"),
        (["x"], "invalid PID 'x'"),
        (["4294967296"], "invalid PID '4294967296'"),
    ],
)
def test_bad_arguments_get_one_sentence(wrong, sentence):
    done = call("watch", *wrong, code=2)
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("closewait-guard")
    assert sentence in last


def test_a_sparkline_shows_the_latest_counts_by_the_highest_of_them():
    assert sparkline([], 10) == ""
    assert sparkline([0, 0], 10) == "▁▁"
    assert sparkline([100, 1, 2], 2) == "▄█"
    assert sparkline([1], 0) == ""
