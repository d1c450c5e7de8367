"""How many wait for a connection of a pool, by library, with real servers and pools of one."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import asynccontextmanager

import aiohttp
import asyncpg
import httpx
import psycopg_pool
import pytest
import redis
import redis.asyncio
import sqlalchemy
import urllib3
from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import create_async_engine

import closewait_guard as cwg
from closewait_guard.integrations import prometheus
from servers import DEADLINE, postgres, redis_server, web


@pytest.fixture(scope="module")
def address():
    with postgres() as port:
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"


@pytest.fixture(scope="module")
def redis_port():
    with redis_server() as port:
        yield port


@pytest.fixture
def server():
    with web() as served:
        yield served


@asynccontextmanager
async def sqlalchemy_pool(address):
    engine = sqlalchemy.create_engine(
        address.replace("://", "+psycopg://"), pool_size=1, max_overflow=0
    )
    try:
        yield engine.raw_connection, lambda connection: connection.close()
    finally:
        engine.dispose()


@asynccontextmanager
async def asynchronous_sqlalchemy_pool(address):
    engine = create_async_engine(address.replace("://", "+psycopg://"), pool_size=1, max_overflow=0)
    try:
        yield lambda: engine.connect().start(), lambda connection: connection.close()
    finally:
        await engine.dispose()


@asynccontextmanager
async def psycopg_pool_(address):
    pool = psycopg_pool.ConnectionPool(address, min_size=1, max_size=1, open=True)
    try:
        yield pool.getconn, pool.putconn
    finally:
        pool.close()


@asynccontextmanager
async def asynchronous_psycopg_pool(address):
    async with psycopg_pool.AsyncConnectionPool(address, min_size=1, max_size=1) as pool:
        yield pool.getconn, pool.putconn


@asynccontextmanager
async def asyncpg_pool(address):
    async with asyncpg.create_pool(address, min_size=1, max_size=1) as pool:
        yield pool.acquire, pool.release


@asynccontextmanager
async def redis_pool(redis_port):
    pool = redis.BlockingConnectionPool(port=redis_port, max_connections=1, timeout=DEADLINE)
    try:
        yield pool.get_connection, pool.release
    finally:
        pool.disconnect()


@asynccontextmanager
async def asynchronous_redis_pool(redis_port):
    pool = redis.asyncio.BlockingConnectionPool(
        port=redis_port, max_connections=1, timeout=DEADLINE
    )
    try:
        yield pool.get_connection, pool.release
    finally:
        await pool.disconnect()


@asynccontextmanager
async def urllib3_pool(server):
    with urllib3.HTTPConnectionPool("127.0.0.1", server.port, maxsize=1, block=True) as pool:
        yield (
            lambda: pool.urlopen("GET", "/", preload_content=False),
            lambda response: response.drain_conn(),
        )


@asynccontextmanager
async def httpx_pool(server):
    with httpx.Client(limits=httpx.Limits(max_connections=1)) as client:
        request = client.build_request("GET", server.url)
        yield lambda: client.send(request, stream=True), lambda response: response.close()


@asynccontextmanager
async def asynchronous_httpx_pool(server):
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=1)) as client:
        request = client.build_request("GET", server.url)
        yield lambda: client.send(request, stream=True), lambda response: response.aclose()


@asynccontextmanager
async def aiohttp_pool(server):
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
        # Larger than what is read at once, or it is given back at once.
        yield lambda: session.get(f"{server.url}/half"), lambda response: response.close()


POOLS = {
    sqlalchemy_pool: "address",
    asynchronous_sqlalchemy_pool: "address",
    psycopg_pool_: "address",
    asynchronous_psycopg_pool: "address",
    asyncpg_pool: "address",
    redis_pool: "redis_port",
    asynchronous_redis_pool: "redis_port",
    urllib3_pool: "server",
    httpx_pool: "server",
    asynchronous_httpx_pool: "server",
    aiohttp_pool: "server",
}


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: pool.__name__)
def test_what_waits_for_a_connection_is_counted_until_it_has_one(pool, request):
    place = request.getfixturevalue(POOLS[pool])
    registry = CollectorRegistry()

    def waiting():
        guard.report()
        found = {
            metric.name: [sample.value for sample in metric.samples]
            for metric in registry.collect()
        }
        # A pool of asyncpg is known by what is out of it.
        return sum(found.get("closewait_guard_pool_waiting", ()))

    async def call(function, *arguments):
        """In a thread, unless it is asynchronous."""
        if inspect.iscoroutinefunction(function):
            return await function(*arguments)
        result = await asyncio.to_thread(function, *arguments)
        return await result if inspect.isawaitable(result) else result

    async def main():
        async with pool(place) as (take, give_back):
            assert waiting() == 0
            taken = await call(take)
            assert waiting() == 0
            others = [asyncio.create_task(call(take)) for _ in range(2)]
            async with asyncio.timeout(DEADLINE):
                while waiting() < 2:
                    await asyncio.sleep(0.02)
            await call(give_back, taken)
            while others:
                async with asyncio.timeout(DEADLINE):
                    await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
                done = next(each for each in others if each.done())
                others.remove(done)
                assert waiting() == len(others)
                await call(give_back, await done)

    with cwg.Guard(cwg.Settings(checkout_grace=0)) as guard:
        prometheus.register(registry, guard=guard)
        asyncio.run(main())
        prometheus.unregister(registry)
