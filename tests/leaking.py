"""Real leaks for tests of reporters: sockets in CLOSE_WAIT, and what is reported of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager

import closewait_guard as cwg
from closewait_guard.testing import half_closed_pair

PRELUDE = """
import os, resource, socket, sys, time
import closewait_guard as cwg
from closewait_guard import reporters
from closewait_guard.testing import half_closed_pair
"""
# A module that leaks a connection, and servers' applications that do.
LEAK = """
import os, socket

kept = []

def leak():
    server = socket.create_server(("127.0.0.1", 0))
    kept.append(socket.create_connection(server.getsockname()))
    server.accept()[0].close()
    server.close()
"""
WSGI = (
    LEAK
    + """
def app(environ, start_response):
    if environ["PATH_INFO"] == "/leak":
        leak()
    start_response("200 OK", [("Content-Length", "4"), ("Connection", "close")])
    return [b"done"]
"""
)
ASGI = (
    LEAK
    + """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["path"] == "/leak":
        leak()
    await send({"type": "http.response.start", "status": 200, "headers": [
        (b"content-length", b"4"), (b"connection", b"close"),
    ]})
    await send({"type": "http.response.body", "body": b"done"})
"""
)


def fetch(stack, unread=b""):
    ours, _ = stack.enter_context(half_closed_pair(unread))
    return ours


@contextmanager
def leaking_guard(*reporters, count=1, **settings):
    """A guard that tells reporters of so many sockets that one line has leaked."""
    with ExitStack() as stack, cwg.Guard(cwg.Settings(grace=0, **settings), reporters) as guard:
        for _ in range(count):
            fetch(stack, b"abc")
        # The kernel dates the end of a connection in ticks of 10 ms.
        time.sleep(0.03)
        yield guard


def report_leaks(*reporters, count=1, **settings):
    """Leak sockets and report them once to some reporters; return the report."""
    with leaking_guard(*reporters, count=count, **settings) as guard:
        return guard.report()


def fork():
    """Python 3.12 warns of any fork while threads run, and eventlet of any fork."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def run(code, *arguments, options=(), **environment):
    """A program of its own; what it wrote to stdout and stderr."""
    done = subprocess.run(
        [sys.executable, *options, "-c", PRELUDE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
