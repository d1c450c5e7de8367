"""Under load from clients and servers of every kind nothing healthy is ever reported.

SOAK_SECONDS sets for how long; the continuous integration runs it for two minutes once.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import contextmanager

import aiohttp
import aiohttp.web
import httpx
import pytest
import requests
import urllib3
import uvloop
import websockets.asyncio.client
import websockets.asyncio.server

import closewait_guard as cwg
from servers import web

SECONDS = float(os.environ.get("SOAK_SECONDS", "3"))


class Load:
    """What runs until the end, in threads of its own; failures of it fail the test."""

    def __init__(self):
        self.end = time.monotonic() + SECONDS
        self.requests = 0
        self.failures = []
        self.threads = []

    def __bool__(self):
        return time.monotonic() < self.end and not self.failures

    def start(self, work, *args):
        def run():
            try:
                work(self, *args)
            except Exception as failure:
                self.failures.append(failure)

        self.threads.append(threading.Thread(target=run, name=work.__name__))
        self.threads[-1].start()

    def join(self):
        for thread in self.threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


def requests_with_a_session(load, url):
    with requests.Session() as session:
        while load:
            assert len(session.get(url).content) == 1000
            load.requests += 1


def requests_without(load, url):
    while load:
        assert len(requests.get(url).content) == 1000
        load.requests += 1


def urllib3_streams(load, url):
    with urllib3.PoolManager(maxsize=2) as manager:
        while load:
            response = manager.request("GET", url, preload_content=False)
            response.read()
            response.release_conn()
            load.requests += 1


def httpx_clients(load, url):
    while load:
        with httpx.Client() as client:
            for _ in range(10):
                assert len(client.get(url).content) == 1000
                load.requests += 1


async def aiohttp_server():
    async def answer(request):
        await asyncio.sleep(0.001)
        # Some connections end with their request, at the server's wish.
        response = aiohttp.web.Response(body=b"x" * 1000)
        if request.query_string == "close":
            response.force_close()
        return response

    application = aiohttp.web.Application()
    application.router.add_get("/", answer)
    runner = aiohttp.web.AppRunner(application)
    await runner.setup()
    site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/"


async def aiohttp_load(load):
    runner, url = await aiohttp_server()

    async def fetch(session):
        while load:
            for query in ("", "?close"):
                async with session.get(url + query) as response:
                    assert len(await response.read()) == 1000
                load.requests += 1

    async with aiohttp.ClientSession() as session, httpx.AsyncClient() as client:

        async def fetch_with_httpx():
            while load:
                assert len((await client.get(url)).content) == 1000
                load.requests += 1

        await asyncio.gather(*(fetch(session) for _ in range(3)), fetch_with_httpx())
    await runner.cleanup()


async def websocket_load(load):
    async def echo(connection):
        async for message in connection:
            await connection.send(message)

    async with websockets.asyncio.server.serve(echo, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        while load:
            async with websockets.asyncio.client.connect(f"ws://127.0.0.1:{port}") as connection:
                for _ in range(5):
                    await connection.send("hello")
                    assert await connection.recv() == "hello"
                    load.requests += 1


def with_asyncio(load, work):
    asyncio.run(work(load))


def with_uvloop(load, work):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work(load))


@contextmanager
def every_kind_of_load():
    with web() as server:
        load = Load()
        for work in (requests_with_a_session, requests_without, urllib3_streams, httpx_clients):
            load.start(work, server.url)
        load.start(with_asyncio, aiohttp_load)
        load.start(with_uvloop, aiohttp_load)
        load.start(with_asyncio, websocket_load)
        load.start(with_uvloop, websocket_load)
        try:
            yield load
        finally:
            load.end = 0
            load.join()


# A loop that ends may leave the collector a closed transport.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_nothing_is_reported_while_every_kind_of_client_and_server_is_at_work():
    scans = 0
    with cwg.Guard(cwg.Settings()) as guard, every_kind_of_load() as load:
        while load:
            report = guard.scan()
            leaked = [leak for leak in report.findings if leak.verdict is cwg.Verdict.LEAKED]
            assert leaked == [], cwg.render_text(report)
            assert report.leaks == (), cwg.render_text(report)
            scans += 1
            time.sleep(0.1)
    assert load.requests > 20 * SECONDS
    assert scans > 2 * SECONDS
