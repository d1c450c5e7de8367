"""Periodic reports from a web application: Starlette under uvicorn, one of whose views leaks.

python examples/web_application.py
"""

import asyncio
import contextlib
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import closewait_guard as cwg
from closewait_guard import reporters

upstream = socket.create_server(("127.0.0.1", 0))
forgotten: list[socket.socket] = []


async def price(_: Request) -> PlainTextResponse:
    connection = socket.create_connection(upstream.getsockname())
    upstream.accept()[0].close()  # The service that we ask hangs up first.
    forgotten.append(connection)  # We never do.
    return PlainTextResponse("42")


@contextlib.asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    reporter = reporters.changes(reporters.text(sys.stdout))
    reports = asyncio.create_task(cwg.watch_async(interval=0.5, reporters=[reporter], grace=0.2))
    yield
    reports.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reports
    cwg.uninstall()


app = Starlette(routes=[Route("/price", price)], lifespan=lifespan)
server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
serving = threading.Thread(target=server.run)
serving.start()
while not server.started:
    time.sleep(0.01)
port = server.servers[0].sockets[0].getsockname()[1]
for _ in range(3):
    urllib.request.urlopen(f"http://127.0.0.1:{port}/price").close()
time.sleep(1.2)
server.should_exit = True
serving.join()
