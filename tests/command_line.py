"""What the tests of the command line share: real commands, leaking programs, a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import pyte

import closewait_guard as cwg
from schema import SCHEMA

# Not the checkout that the tests may stand in, but what is installed.
COMMAND = [sys.executable, "-P", "-m", "closewait_guard"]

# Leaks three connections that it made, with two unread bytes each, and two that it accepted;
# keeps one that is well. Ends when its stdin does.
LEAKY = """
import os, socket, sys
server = socket.create_server(("127.0.0.1", 0))
kept = []
for _ in range(3):
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    accepted.sendall(b"42")
    accepted.close()
    kept.append(client)
for _ in range(2):
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    client.close()
    kept.append(accepted)
well = socket.create_connection(server.getsockname()), server.accept()
"""
WAIT = """
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""

# A connection in CLOSE_WAIT of which the kernel dates the last answer to a keepalive probe.
ANSWERS_KEEPALIVES = (
    """
import socket, sys, time
server = socket.create_server(("127.0.0.1", 0))
ours = socket.create_connection(server.getsockname())
theirs, _ = server.accept()
ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
theirs.sendall(b"42")
theirs.close()
time.sleep(2.5)
"""
    + WAIT
)


def environment(**variables):
    """The tests' own settings must not reach the commands, nor the terminal's size."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CLOSEWAIT_GUARD_", "_CLOSEWAIT_GUARD_", "PYTEST_", "COV_"))
        and name not in ("COLUMNS", "LINES", "PYTHONPATH", "PYTHONUNBUFFERED")
    }
    return kept | {"PYTHONWARNINGS": "ignore::ResourceWarning"} | variables


def call(*arguments, stdin=None, cwd=None, command=COMMAND, code=None, **variables):
    """Run a command to its end; its output must never show a traceback of ours."""
    done = subprocess.run(
        [*command, *map(str, arguments)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=environment(**variables),
    )
    assert "Traceback" not in done.stderr, done.stderr
    if code is not None:
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


@contextmanager
def program(source=LEAKY + WAIT, *arguments, prefix=(), **options):
    """A running Python program, once it has printed its first line."""
    with subprocess.Popen(
        [*prefix, sys.executable, "-c", source, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        **options,
    ) as running:
        running.first_line = running.stdout.readline().strip()
        assert running.first_line
        try:
            yield running
        finally:
            running.stdin.close()


def documents(text):
    """The reports in JSON lines, each proven to be of the schema and to come back as they were."""
    found = []
    for line in text.splitlines():
        data = json.loads(line)
        jsonschema.validate(data, SCHEMA)
        report = cwg.from_dict(data)
        assert cwg.to_dict(report) == data
        found.append(report)
    return found


# What is typed as Ctrl-C becomes a signal only of a session's own terminal.
CONTROLLED = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A command on a pseudo-terminal, and what a person sees there."""

    def __init__(self, *command, columns=80, lines=24, **variables):
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._fd, theirs = os.openpty()
        self.resize(columns, lines)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLED, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=environment(TERM="xterm-256color", **variables),
        )
        os.close(theirs)

    def resize(self, columns, lines):
        self.screen.resize(lines, columns)
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, size)

    def type(self, keys):
        os.write(self._fd, keys.encode())

    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display)

    def until(self, wanted, seconds=20.0):
        """Read until the screen fulfils a condition, or shows a text; the screen's text."""
        condition = wanted if callable(wanted) else lambda text: wanted in text
        deadline = time.monotonic() + seconds
        while not condition(self.text()):
            assert time.monotonic() < deadline, self.text()
            assert self._read(), self.text()
        return self.text()

    def wait(self, seconds=20.0):
        """Read to the end; the exit code, or the signal below zero."""
        deadline = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < deadline, self.text()
        return self.process.wait(60)

    def _read(self):
        """Whether there may be more to come."""
        if not select.select([self._fd], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)
        os.close(self._fd)


# How a running program is attached to.
HAS_REMOTE_EXEC = sys.version_info >= (3, 14)


def can_attach():
    """Whether this machine lets a process be attached to, and has what that needs."""
    if sys.platform != "linux" or not (HAS_REMOTE_EXEC or shutil.which("gdb")):
        return False
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text().strip() != "0" and os.geteuid():
        return False
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        try:
            os.close(os.open(f"/proc/{child.pid}/mem", os.O_RDONLY))
        except OSError:
            return False
        finally:
            child.kill()
    return True
