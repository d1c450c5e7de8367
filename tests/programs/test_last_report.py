"""The last report of real servers: what has leaked is not missing from it, however they end."""

from __future__ import annotations

import signal
import subprocess
import time
import urllib.request

import pytest

from command_line import COMMAND, environment
from servers import free_port

APP = """
import asyncio, socket

kept = []

class Deaf(asyncio.Protocol):
    def eof_received(self):
        return True

async def forget(reader, writer):
    writer.close()

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    server = await asyncio.start_server(forget, "127.0.0.1", 0)
    loop = asyncio.get_running_loop()
    for _ in range(3):
        address = server.sockets[0].getsockname()
        kept.append(await loop.create_connection(Deaf, *address))
    await asyncio.sleep(0.2)
    server.close()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})
"""


def get(port):
    """One request, once the server listens."""
    end = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as response:
                return response.read()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_uvicorn_reports_its_leaks_when_it_is_terminated(tmp_path, loop):
    (tmp_path / "app.py").write_text(APP)
    port = free_port()
    command = ["-m", "uvicorn", "--loop", loop, "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(
        [*COMMAND, "run", "--grace", "0.1", *command, "app:app"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path)),
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert get(port) == b"done"
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=60)
    assert server.returncode == -signal.SIGTERM, errors
    assert "closewait_guard: 3 leaked of" in " ".join(errors.split()), errors
