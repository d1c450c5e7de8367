"""The table of libraries in docs/coverage.md: where it promises your line, the line is yours."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import inspect
import socket
import urllib.request
from pathlib import Path

import aiohttp
import anyio
import httpcore
import httpx
import pytest
import redis
import redis.asyncio
import requests
import trio
import urllib3
import websockets.asyncio.client
import websockets.asyncio.server

import closewait_guard as cwg
from servers import redis_server, web

ROOT = Path(__file__).parents[2]


def rows():
    """The cells of each row of the table."""
    text = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells for cells in table if len(cells) == 5][1:]


def site_of_newest(guard):
    """Where the newest socket that connects was opened."""
    report = guard.scan(full=True)
    seen = [*report.observations, *(leak.observation for leak in report.findings)]
    records = [each.record.opener for each in seen]
    created = [record for record in records if record.origin is cwg.Origin.CREATED]
    site = max(created, key=lambda record: record.serial).site
    return Path(site.filename).name, site.function.rpartition(".")[2]


def plain_socket(server, look):
    with socket.create_connection(("127.0.0.1", server.port)):
        return look()


def of_http_client(server, look):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/")
    with connection.getresponse():
        found = look()
    connection.close()
    return found


def of_urllib(server, look):
    with urllib.request.urlopen(server.url + "/partial"):
        return look()


def of_requests(server, look):
    with requests.Session() as session, session.get(server.url, stream=True):
        return look()


def of_urllib3(server, look):
    with urllib3.PoolManager() as pool:
        pool.request("GET", server.url)
        return look()


def of_httpx(server, look):
    with httpx.Client() as client:
        client.get(server.url)
        return look()


def of_httpcore(server, look):
    with httpcore.ConnectionPool() as pool:
        pool.request("GET", server.url)
        return look()


async def of_streams(server, look):
    _, writer = await asyncio.open_connection("localhost", server.port)
    found = look()
    writer.close()
    await writer.wait_closed()
    return found


async def of_happy_eyeballs(server, look):
    _, writer = await asyncio.open_connection(
        "localhost", server.port, happy_eyeballs_delay=0.25, interleave=1
    )
    found = look()
    writer.close()
    await writer.wait_closed()
    return found


async def of_anyio(server, look):
    async with await anyio.connect_tcp("127.0.0.1", server.port):
        return look()


async def of_trio(server, look):
    async with await trio.open_tcp_stream("127.0.0.1", server.port):
        return look()


async def of_async_httpx(server, look):
    async with httpx.AsyncClient() as client:
        await client.get(server.url)
        return look()


async def of_async_httpcore(server, look):
    async with httpcore.AsyncConnectionPool() as pool:
        await pool.request("GET", server.url)
        return look()


async def of_httpx_in_gather(server, look):
    async with httpx.AsyncClient() as client:
        await asyncio.gather(client.get(server.url), asyncio.sleep(0))
        return look()


async def of_httpx_in_group(server, look):
    async with httpx.AsyncClient() as client:
        async with asyncio.TaskGroup() as group:
            group.create_task(client.get(server.url))
        return look()


async def of_httpx_in_wait_for(server, look):
    async with httpx.AsyncClient() as client:
        await asyncio.wait_for(asyncio.gather(client.get(server.url)), 60)
        return look()


async def of_aiohttp(server, look):
    async with aiohttp.ClientSession() as session, session.get(server.url):
        return look()


async def of_aiohttp_in_group(server, look):
    async with aiohttp.ClientSession() as session:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(session._request("GET", server.url))
        # Otherwise it is collected during one of the tests, which aiohttp warns of.
        with contextlib.closing(task.result()):
            return look()


async def of_websockets(_, look):
    async def wait(connection):
        await connection.wait_closed()

    async with websockets.asyncio.server.serve(wait, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with websockets.asyncio.client.connect(f"ws://127.0.0.1:{port}"):
            return look()


def of_redis(_, look):
    with redis_server() as port, redis.Redis(port=port) as client:
        client.ping()
        return look()


async def of_async_redis(_, look):
    with redis_server() as port:
        async with redis.asyncio.Redis(port=port) as client:
            await asyncio.gather(client.ping())
            return look()


WAYS = {
    "socket, socketserver, http.client, urllib": [plain_socket, of_http_client, of_urllib],
    "asyncio streams, TLS, accepted connections": [of_streams, of_happy_eyeballs],
    "trio, anyio": [of_anyio, of_trio],
    "requests, urllib3": [of_requests, of_urllib3],
    "httpx and httpx2 (the clients of openai, anthropic), httpcore, sync and async": [
        of_httpx,
        of_httpcore,
        of_async_httpx,
        of_async_httpcore,
        of_httpx_in_gather,
        of_httpx_in_group,
        of_httpx_in_wait_for,
    ],
    "aiohttp": [of_aiohttp, of_aiohttp_in_group],
    "redis-py, sync and async": [of_redis, of_async_redis],
    "websockets": [of_websockets],
}
ON_TRIO = (of_anyio, of_trio, of_async_httpx, of_async_httpcore)


@pytest.mark.parametrize("way", [way for ways in WAYS.values() for way in ways])
def test_each_library_of_which_the_page_promises_your_line_names_it(guard, way):
    def look():
        return site_of_newest(guard)

    with web() as server:
        if not inspect.iscoroutinefunction(way):
            found = way(server, look)
        elif way is of_trio:
            found = trio.run(way, server, look)
        else:
            found = asyncio.run(way(server, look))
    assert found == (Path(__file__).name, way.__name__)


@pytest.mark.parametrize("way", ON_TRIO)
def test_what_also_runs_on_trio_names_your_line_there(guard, way):
    with web() as server:
        found = trio.run(way, server, lambda: site_of_newest(guard))
    assert found == (Path(__file__).name, way.__name__)


def test_each_row_is_made_here_or_by_the_test_that_it_names():
    names = [name for name, *_ in rows()]
    assert names
    assert WAYS.keys() <= set(names)
    for name, _, opened_where, _, tests in rows():
        if name in WAYS:
            assert opened_where.startswith("your line"), name
        for test in tests.split(", ") if tests else ():
            [path] = (ROOT / "tests").rglob(test.strip("`"))
            assert path.is_file()
