"""Frameworks on their own servers: a leak has its endpoint and line; a healthy one is silent."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import closewait_guard as cwg
from command_line import environment
from servers import DEADLINE, end, free_port, get

pytestmark = pytest.mark.whole_program

# As of a program that asks another service.
COMMON = """
import os, socket, threading
import closewait_guard as cwg

options = dict(interval=0.2, grace=0.1, reporters=["json_lines:" + os.environ["REPORTS"]])
service = socket.create_server(("127.0.0.1", 0), backlog=100)
kept = []

def serve():
    while True:
        with service.accept()[0] as peer:
            peer.recv(9)

threading.Thread(target=serve, daemon=True).start()

def ask():
    with socket.create_connection(service.getsockname()) as client:
        client.send(b"x")
        client.recv(9)

def leak():
    client = socket.create_connection(service.getsockname())
    client.send(b"x")
    kept.append(client)
"""
STARLETTE = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

def item(request):
    leak() if request.path_params["item"] == "leak" else ask()
    return PlainTextResponse("done")

app = cwg.asgi(Starlette(routes=[Route("/items/{item}", item)]), **options)
"""
FASTAPI = """
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

app = FastAPI(default_response_class=PlainTextResponse)
app.add_middleware(cwg.asgi, **options)

@app.get("/items/{item}")
def item(item: str):
    leak() if item == "leak" else ask()
    return "done"
"""
FLASK = """
from flask import Flask

app = Flask(__name__)
app.wsgi_app = cwg.wsgi(app.wsgi_app, **options)

@app.get("/items/<item>")
def item(item):
    leak() if item == "leak" else ask()
    return "done"
"""
AIOHTTP = """
import asyncio, logging
from aiohttp import web

# A line for each request would fill the pipe, which nobody reads before the end.
logging.disable(logging.INFO)

async def item(request):
    await asyncio.to_thread(leak if request.match_info["item"] == "leak" else ask)
    return web.Response(text="done")

def make_app(argv):
    app = web.Application()
    app.router.add_get("/items/{item}", item)
    return cwg.aiohttp(app, **options)
"""
FRAMEWORKS = {
    "starlette": (STARLETTE, "uvicorn --log-level error --port {port} app:app"),
    "fastapi": (FASTAPI, "uvicorn --log-level error --port {port} app:app"),
    "flask": (
        FLASK,
        "gunicorn -k gthread --threads 4 --log-level error -b 127.0.0.1:{port} app:app",
    ),
    "aiohttp": (AIOHTTP, "aiohttp.web -H 127.0.0.1 -P {port} app:make_app"),
}


def reports_of(path):
    if not path.exists():
        return []
    return [cwg.from_dict(json.loads(line)) for line in path.read_text().splitlines()]


def until(condition):
    """What a condition has returned, once that is something."""
    deadline = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def load(port, seconds):
    """Ask over a connection that stays, and over new ones; how often it was answered."""
    count, until = 0, time.monotonic() + seconds
    kept = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    while time.monotonic() < until:
        kept.request("GET", f"/items/{count}")
        assert kept.getresponse().read() == b"done"
        assert get(port, f"/items/{count}") == b"done"
        count += 2
    kept.close()
    return count


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_is_silent_under_load_and_a_leak_has_its_endpoint_and_line(tmp_path, framework):
    pytest.importorskip(framework)
    code, command = FRAMEWORKS[framework]
    (tmp_path / "app.py").write_text(COMMON + code)
    port, reports = free_port(), tmp_path / "reports"
    with subprocess.Popen(
        [sys.executable, "-m", *command.format(port=port).split()],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path), REPORTS=str(reports)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert get(port, "/items/first") == b"done"
            with ThreadPoolExecutor(2) as clients:
                assert all(clients.map(load, [port] * 2, [2.0] * 2))
            before = until(lambda: reports_of(reports))
            assert not [each for report in before for each in report.leaks]
            get(port, "/items/leak")
            (leak,) = until(lambda: reports_of(reports)[-1].leaks)
        finally:
            errors = end(server, signal.SIGTERM)
    record = leak.observation.record
    item = "<item>" if framework == "flask" else "{item}"
    assert record.labels == (f"GET /items/{item}",)
    assert record.site.source == "client = socket.create_connection(service.getsockname())"
    assert "Traceback" not in errors
    # The last report comes when the application ends.
    assert len(reports_of(reports)[-1].leaks) == 1
