"""Programs that are attached to, and say what that has changed in them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from command_line import COMMAND, LEAKY, environment
from servers import DEADLINE

# Answers each letter of stdin with what has changed of its state; meanwhile its main thread runs.
# Before that, + opens a connection that the peer closes, - closes all of those, and f has a forked
# child answer instead. After * it forks all the time, and ends if it has another thread then.
STATE = (
    LEAKY
    + """
import asyncio, gc, json, select, signal, threading

def state():
    return {
        "modules": sorted(name for name in sys.modules if "closewait" in name),
        "threads": sorted(map(repr, threading.enumerate())),
        "tasks": len(os.listdir("/proc/self/task")),
        "known threads": len(threading._active),
        # What lists them has the last one. libffi, which ctypes uses, keeps a file of its own open.
        "fds": sorted(
            path
            for fd in os.listdir("/proc/self/fd")
            if (path := link(fd)) and "libffi" not in path
        ),
        "path": sys.path,
        "finders": list(map(repr, sys.meta_path)),
        "class": {name: repr(value) for name, value in vars(socket.socket).items()},
        "loops": {name: repr(value) for name, value in vars(asyncio.BaseEventLoop).items()},
        "main": sorted(vars(sys.modules["__main__"])),
        "signals": [repr(signal.getsignal(number)) for number in range(1, 32)],
        "mask": repr(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "files": os.listdir("."),
        "caches": [path for path in sys.path_importer_cache if "closewait" in path],
        "collector": [gc.isenabled(), len(gc.callbacks)],
    }

def link(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""

def leak():
    late.append(socket.create_connection(server.getsockname()))
    server.accept()[0].close()

def answer():
    now = state()
    changed = {name: [before[name], now[name]] for name in now if now[name] != before[name]}
    print(json.dumps(changed), flush=True)

def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert tasks.pop() == 1

# Python counts them at the same moment, before the guard's own hook is called.
os.register_at_fork(after_in_parent=lambda: tasks.append(len(os.listdir("/proc/self/task"))))
late, tasks, is_forking, before, letter = [], [], False, None, b""
before = state()
print(os.getpid(), flush=True)
while True:
    if is_forking:
        fork()
    if select.select([0], [], [], 0.01)[0]:
        letter = os.read(0, 1)
        if not letter:
            break
        if letter == b"+":
            leak()
        is_forking ^= letter == b"*"
        while letter == b"-" and late:
            late.pop().close()
        if letter != b"f":
            answer()
        elif os.fork() == 0:
            answer()
            os._exit(0)
        else:
            os.wait()
"""
)
# Its main thread waits in accept().
SERVER = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
kept = []
print(server.getsockname()[1], flush=True)
while True:
    kept.append(server.accept()[0])
"""


@contextmanager
def running(code, *options, command=(sys.executable, "-I"), **popen):
    """A program that prints one line when it is ready; ended in the end."""
    command = [*command, *options, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, **popen) as program:
        try:
            program.ready = program.stdout.readline().strip()
            assert program.ready
            yield program
        finally:
            program.kill()


def what_changed(program, letter="?"):
    program.stdin.write(letter)
    program.stdin.flush()
    return json.loads(program.stdout.readline())


def folders_for(program):
    return list(Path("/tmp").glob(f"closewait-guard-{program.pid}-*"))


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


# No grace time.
NOW = {"CLOSEWAIT_GUARD_GRACE": "0"}


@contextmanager
def watching(program, *options, seconds=30):
    """`attach --watch`, once the guard is in."""
    command = [*COMMAND, "attach", str(program.pid), "--watch", str(seconds), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(**NOW), **pipes) as watch:
        try:
            line = watch.stderr.readline()
            assert line.startswith("Watching "), line + watch.stderr.read()
            yield watch
        finally:
            watch.kill()


def interrupt(command):
    """What it prints after Ctrl-C, with the status that it ends with."""
    command.send_signal(signal.SIGINT)
    output, errors = command.communicate(timeout=DEADLINE)
    assert "Traceback" not in errors
    return output, errors, command.returncode
