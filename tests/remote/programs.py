"""Programs that are asked through their control sockets while they run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager

from closewait_guard._remote import ask_control

# One connection that the peer has closed; then stuck in a call of C.
LEAK = """
import os, socket, sys, time
server = socket.create_server(("127.0.0.1", 0))
kept = socket.create_connection(server.getsockname())
server.accept()[0].close()
"""
INSTALL = """
import closewait_guard as cwg
guard = cwg.install(control=True, grace=0)
"""
STUCK = """
print(os.getpid(), flush=True)
server.accept()
"""
DEADLINE = 30.0


@contextmanager
def running(code, folder, *, command=(sys.executable, "-c"), **options):
    """A program, which is ended afterwards; its control sockets lie in a folder."""
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith("CLOSEWAIT_GUARD")
    } | {"XDG_RUNTIME_DIR": str(folder)}
    with subprocess.Popen(
        [*command, code], stdout=subprocess.PIPE, text=True, env=environ, **options
    ) as program:
        try:
            yield program
        finally:
            program.kill()


def line_of(program):
    """The next line that it prints."""
    line = program.stdout.readline().strip()
    assert line, program.wait()
    return line


def report_of(pid):
    """The report that a process answers with."""
    return ask_control(pid, {"request": "report"}, DEADLINE)["report"]


def eventually(holds):
    """Wait until something holds."""
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
