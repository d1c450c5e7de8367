"""What a label for each request and a monitor, of a scan a minute, cost a web framework.

The processor time of the server for a request over a connection that stays, as the kernel counts
it. A bare server and a watched one take turns every fraction of a second, and are replaced by new
ones several times: see `http_workload`. They share one processor, and what asks has another: moved
between them, a server takes a third more or less for the same request.
"""

from __future__ import annotations

import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.result import Result

_GENERATIONS, _ROUNDS, _REQUESTS, _WARM_UP = 6, 40, 50, 500
_BOUND = 1.02
_START_SECONDS = 60.0
_REQUEST = b"GET /items/42 HTTP/1.1\r\nHost: x\r\n\r\n"

_COMMON = """
import os, sys
import closewait_guard as cwg
options = dict(reporters=[lambda report: None])
is_watched = bool(os.environ.get("WATCHED"))
"""
_STARLETTE = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

async def item(request):
    return PlainTextResponse(str(os.getpid()))

app = Starlette(routes=[Route("/items/{item}", item)])
app = cwg.asgi(app, **options) if is_watched else app
"""
_FLASK = """
from flask import Flask

app = Flask(__name__)

@app.get("/items/<item>")
def item(item):
    return str(os.getpid())

app.wsgi_app = cwg.wsgi(app.wsgi_app, **options) if is_watched else app.wsgi_app
"""
_DJANGO = """
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path

def item(request, item):
    return HttpResponse(str(os.getpid()))

urlpatterns = [path("items/<int:item>", item)]
ours = "closewait_guard.integrations.django"
settings.configure(
    ALLOWED_HOSTS=["*"],
    CLOSEWAIT_GUARD=options,
    INSTALLED_APPS=[ours] if is_watched else [],
    MIDDLEWARE=[
        *([f"{ours}.Middleware"] if is_watched else []),
        "django.middleware.security.SecurityMiddleware",
        "django.middleware.common.CommonMiddleware",
    ],
    ROOT_URLCONF=__name__,
    SECRET_KEY="of no use",
)
app = get_wsgi_application()
"""
_AIOHTTP = """
from aiohttp import web

async def item(request):
    return web.Response(text=str(os.getpid()))

app = web.Application()
app.router.add_get("/items/{item}", item)
app = cwg.aiohttp(app, **options) if is_watched else app
if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
"""


class _Framework(NamedTuple):
    name: str
    program: str
    command: str


_FRAMEWORKS = (
    _Framework(
        "Starlette on uvicorn",
        _STARLETTE,
        "uvicorn --timeout-keep-alive 600 --log-level error --port {port} app:app",
    ),
    _Framework(
        "Flask on gunicorn",
        _FLASK,
        "gunicorn -k gthread --threads 1 --keep-alive 600 --log-level error"
        " -b 127.0.0.1:{port} app:app",
    ),
    _Framework(
        "Django on gunicorn",
        _DJANGO,
        "gunicorn -k gthread --threads 1 --keep-alive 600 --log-level error"
        " -b 127.0.0.1:{port} app:app",
    ),
    _Framework("aiohttp on its server", _AIOHTTP, "app {port}"),
)


def run(*, quick: bool) -> list[Result]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        return [_result(framework, max(before), quick=quick) for framework in _FRAMEWORKS]
    finally:
        os.sched_setaffinity(0, before)


def _result(framework: _Framework, processor: int, *, quick: bool) -> Result:
    ratios, bare = list[float](), list[float]()
    for _ in range(1 if quick else _GENERATIONS):
        with ExitStack() as stack:
            servers = [stack.enter_context(_started(framework, each)) for each in ("", "1")]
            for server in servers:
                server.stay_on(processor)
                server.seconds(_WARM_UP if not quick else 10)
            for _ in range(2 if quick else _ROUNDS):
                found = dict.fromkeys(servers, 0.0)
                for server in random.sample(servers, 2):
                    found[server] = server.seconds(10 if quick else _REQUESTS)
                ratios.append(found[servers[1]] / found[servers[0]])
                bare.append(found[servers[0]])
    name = f"CPU of a request: {framework.name}, label and monitor"
    return Result(name, statistics.median(bare) * 1e6, "us", statistics.median(ratios), _BOUND)


class _Server:
    """One process that answers, and a connection to it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pid = int(self._ask().rpartition(b"\n")[2])

    def stay_on(self, processor: int) -> None:
        for task in Path(f"/proc/{self._pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {processor})

    def seconds(self, count: int) -> float:
        """The processor time of the server for one of so many requests."""
        before = _processor_time(self._pid)
        for _ in range(count):
            self._ask()
        return (_processor_time(self._pid) - before) / count

    def _ask(self) -> bytes:
        self._connection.sendall(_REQUEST)
        answer = b""
        while not answer.rpartition(b"\n")[2].isdigit():
            piece = self._connection.recv(65536)
            assert piece, "the server has closed the connection"
            answer += piece
        return answer


def _processor_time(pid: int) -> float:
    """Of all threads of a process, in seconds. Linux only."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text(encoding="ascii").split()[0]) for path in tasks) / 1e9


@contextmanager
def _started(framework: _Framework, watched: str) -> Iterator[_Server]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        Path(folder, "app.py").write_text(_COMMON + framework.program, encoding="utf-8")
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        words = framework.command.format(port=port).split()
        environment = os.environ | {"WATCHED": watched, "PYTHONPATH": folder}
        with subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
        ) as process:
            try:
                with _connected(port) as connection:
                    yield _Server(connection)
            finally:
                process.terminate()


def _connected(port: int) -> socket.socket:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), _START_SECONDS)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
