"""A client for each call that is kept, of libraries that close what is collected by themselves."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
from test_owners import owners_in, quietly, url

import closewait_guard as cwg
from closewait_guard import Verdict
from servers import redis_server

botocore_session = pytest.importorskip("botocore.session")
botocore_config = pytest.importorskip("botocore.config")
httpx = pytest.importorskip("httpx")
redis = pytest.importorskip("redis")
redis_asyncio = pytest.importorskip("redis.asyncio")
requests = pytest.importorskip("requests")
urllib3 = pytest.importorskip("urllib3")
websockets = pytest.importorskip("websockets.asyncio.client")
servers_of_websockets = pytest.importorskip("websockets.sync.server")

# More than `surplus` allows, also where tests before have left some threads or tasks.
MANY = 20
# A fixture, which must have a name here.
url = url


@pytest.fixture
def guard():
    gc.collect()
    with cwg.Guard(cwg.Settings(grace=0.05)) as installed:
        yield installed


@pytest.fixture(scope="module")
def redis_port():
    with redis_server() as port:
        yield port


@pytest.fixture
def address(request, url, redis_port):
    return redis_port if "redis" in request.node.callspec.id else url


def get_by_session(url):
    session = requests.Session()
    session.get(url, timeout=9)
    return session


def get_by_manager(url):
    manager = urllib3.PoolManager()
    manager.request("GET", url)
    return manager


def get_by_pool(url):
    parts = urlsplit(url)
    pool = urllib3.HTTPConnectionPool(parts.hostname, parts.port)
    pool.request("GET", "/")
    return pool


def get_by_botocore(url):
    config = botocore_config.Config(
        s3={"addressing_style": "path"}, response_checksum_validation="when_required"
    )
    client = botocore_session.Session().create_client(
        "s3",
        "us-east-1",
        endpoint_url=url,
        config=config,
        aws_access_key_id="x",
        aws_secret_access_key="x",
    )
    client.get_object(Bucket="bucket", Key="key")["Body"].read()
    return client


def ask_redis(port):
    client = redis.Redis(port=port)
    client.ping()
    return client


def ask_redis_by_pool(port):
    pool = redis.ConnectionPool(port=port)
    redis.Redis(connection_pool=pool).ping()
    return pool


CLIENTS = {
    get_by_session: ("requests.Session", "close"),
    get_by_manager: ("urllib3.PoolManager", "clear"),
    get_by_pool: ("urllib3.HTTPConnectionPool", "close"),
    get_by_botocore: ("botocore client", "close"),
    ask_redis: ("redis.Redis", "close"),
    ask_redis_by_pool: ("redis.ConnectionPool", "disconnect"),
}
each_client = pytest.mark.parametrize("make", CLIENTS, ids=lambda function: function.__name__)


@each_client
def test_those_that_are_kept_are_more_than_are_needed_and_counted_once(guard, address, make):
    kept = [make(address) for _ in range(MANY)]
    found = owners_in(guard.scan())
    for each in kept:
        getattr(each, CLIENTS[make][1])()
    assert [(each.verdict, each.code) for each in found] == [(Verdict.SURPLUS, "CWG903")] * MANY
    assert {each.observation.owner.name for each in found} == {CLIENTS[make][0]}
    assert {each.observation.owner.sockets for each in found} == {1}
    assert found[0].observation.record.site.function == make.__name__
    assert found[0].hint.startswith("reuse one")
    assert guard.scan().findings == ()


async def make_tasks(cls, *, last):
    """As many tasks of a class that have ended in one way, or wait."""

    async def end():
        if last == "fails":
            raise ValueError
        await asyncio.sleep(60 if last in ("waits", "is cancelled") else 0)

    tasks = [cls(end(), loop=asyncio.get_running_loop()) for _ in range(1000)]
    await asyncio.sleep(0.01)
    for task in tasks if last == "is cancelled" else ():
        task.cancel()
    if last != "waits":
        await asyncio.gather(*tasks, return_exceptions=True)
    return tasks


@pytest.mark.parametrize("cls", [asyncio.Task, asyncio.tasks._PyTask])
@pytest.mark.parametrize("last", ["returns", "fails", "is cancelled", "waits"])
def test_finished_tasks_of_asyncio_need_no_client(guard, url, cls, last):
    async def main():
        tasks = await make_tasks(cls, last=last)
        kept = [get_by_session(url) for _ in range(MANY)]
        found = owners_in(guard.scan())
        for each in kept:
            each.close()
        for task in tasks:
            task.cancel()
        assert len(tasks) == 1000
        assert len(found) == (0 if last == "waits" else MANY)

    asyncio.run(main())


class OwnTask(asyncio.Task):
    """As a task factory of the program makes them."""

    def done(self):
        raise AssertionError("code of the program is run")


def test_tasks_of_a_class_of_the_program_may_need_a_client_each(guard, url):
    async def main():
        tasks = [OwnTask(asyncio.sleep(60), loop=asyncio.get_running_loop()) for _ in range(MANY)]
        kept = [get_by_session(url) for _ in range(MANY)]
        assert owners_in(guard.scan()) == []
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0.01)
        assert len(owners_in(guard.scan())) == MANY
        for each in kept:
            each.close()

    asyncio.run(main())


@pytest.mark.parametrize("name", ["greenlet", "of a class that derives from it, as in gevent"])
def test_finished_greenlets_need_no_client(guard, url, name):
    greenlet = pytest.importorskip("greenlet")
    cls = greenlet.greenlet if name == "greenlet" else type("Own", (greenlet.greenlet,), {})

    def switch_back():
        greenlet.getcurrent().parent.switch()

    greenlets = [cls(switch_back) for _ in range(1000)]
    for each in greenlets:
        each.switch()
    kept = [get_by_session(url) for _ in range(MANY)]
    assert owners_in(guard.scan()) == []
    for each in greenlets:
        each.switch()
    assert len(owners_in(guard.scan())) == MANY
    for each in kept:
        each.close()


def test_finished_tasks_of_trio_need_no_client(guard, url):
    trio = pytest.importorskip("trio")
    tasks, found, released = [], [], trio.Event()

    async def wait():
        tasks.append(trio.lowlevel.current_task())
        await released.wait()

    async def main():
        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(wait)
            await trio.sleep(0.01)
            found.append(owners_in(guard.scan()))
            released.set()
        found.append(owners_in(guard.scan()))

    kept = [get_by_session(url) for _ in range(MANY)]
    trio.run(main)
    for each in kept:
        each.close()
    assert (len(tasks), [len(each) for each in found]) == (1000, [0, MANY])


@each_client
def test_few_and_those_that_are_collected_or_closed_are_not(guard, address, make):
    kept = [make(address) for _ in range(4)]
    for _ in range(MANY if make is not ask_redis_by_pool else 0):
        make(address)
    for _ in range(MANY):
        getattr(make(address), CLIENTS[make][1])()
    gc.collect()
    assert guard.scan().findings == ()
    for each in kept:
        getattr(each, CLIENTS[make][1])()


def ask_database(port, number):
    client = redis.Redis(port=port, db=number)
    client.ping()
    return client


def test_a_client_for_each_database_of_a_redis_is_not(guard, redis_port):
    kept = [ask_database(redis_port, number) for number in range(16)]
    assert guard.scan().findings == ()
    kept[0].client_kill_filter(_type="normal")
    time.sleep(0.2)
    found = guard.scan().findings
    for each in kept:
        each.close()
    assert [each.verdict for each in found] == [Verdict.STALE_POOL] * 15


def test_a_client_for_each_host_by_name_is_not(guard, url, monkeypatch):
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *args: real("127.0.0.1", *args))
    port = url.rpartition(":")[2].rstrip("/")
    for make in (get_by_session, get_by_manager, get_by_pool, get_by_client):
        kept = [make(f"http://shop{number}.example.com:{port}") for number in range(MANY)]
        assert guard.scan().findings == ()
        for each in kept:
            each.clear() if make is get_by_manager else each.close()


def get_by_client(url, **options):
    client = httpx.Client(trust_env=False, **options)
    client.get(url)
    return client


def test_clients_that_share_a_transport_are_one(guard, url):
    transport = httpx.HTTPTransport()
    kept = [get_by_client(url, transport=transport) for _ in range(MANY)]
    assert guard.scan().findings == ()
    for each in kept:
        each.close()


# Connections of websockets.


@pytest.fixture
def websocket_port():
    def echo(connection):
        for message in connection:
            connection.send(message)

    with servers_of_websockets.serve(echo, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        before = set(threading.enumerate())
        yield server.socket.getsockname()[1]
        server.shutdown()
        for each in (*(set(threading.enumerate()) - before), thread):
            each.join(30)


async def talk(port, *, close=False):
    connection = await websockets.connect(f"ws://127.0.0.1:{port}")
    await connection.send("x")
    await connection.recv()
    if close:
        await connection.close()
    return connection


def test_a_connection_of_websockets_that_outlives_its_event_loop_is_found(guard, websocket_port):
    with quietly():
        asyncio.run(talk(websocket_port))
        kept = asyncio.run(talk(websocket_port))
    found = owners_in(guard.scan())
    assert {(each.verdict, each.code) for each in found} == {
        (Verdict.UNCLOSED, "CWG901"),
        (Verdict.UNCLOSED, "CWG902"),
    }
    assert {each.observation.owner.name for each in found} == {"websockets connection"}
    assert found[0].observation.record.site.function == "talk"
    assert "async with connect(...)" in found[0].hint
    with quietly():
        del kept


def test_a_connection_of_websockets_that_is_closed_is_not(guard, websocket_port):
    kept = asyncio.run(talk(websocket_port, close=True))
    assert owners_in(guard.scan()) == []
    del kept


def test_a_pool_of_redis_that_was_given_to_a_client_and_is_collected_is_found(guard, redis_port):
    with quietly():
        # A collection before the pool has connected would have the connection finalized before it,
        # which lets go of its socket: then that is found, as dropped.
        gc.collect()
        gc.disable()
        try:
            ask_redis_by_pool(redis_port)
        finally:
            gc.enable()
    (found,) = guard.scan().findings
    assert (found.verdict, found.code) == (Verdict.UNCLOSED, "CWG901")
    assert found.observation.owner.name == "redis.ConnectionPool"
    assert "pool.disconnect()" in found.hint


# Asynchronous ones.


async def get_by_async_client(url):
    client = httpx.AsyncClient(trust_env=False)
    await client.get(url)
    return client


async def ask_redis_async(port):
    client = redis_asyncio.Redis(port=port)
    await client.ping()
    return client


async def ask_redis_async_by_pool(port):
    pool = redis_asyncio.ConnectionPool(port=port)
    await redis_asyncio.Redis(connection_pool=pool).ping()
    return pool


ASYNC_CLIENTS = {
    get_by_async_client: ("httpx.AsyncClient", "aclose"),
    ask_redis_async: ("redis.asyncio.Redis", "aclose"),
    ask_redis_async_by_pool: ("redis.asyncio.ConnectionPool", "disconnect"),
}
each_async_client = pytest.mark.parametrize(
    "make", ASYNC_CLIENTS, ids=lambda function: function.__name__
)


@each_async_client
def test_what_outlives_its_event_loop_is_found_while_it_is_kept_and_later(guard, address, make):
    kept = [asyncio.run(make(address))]
    (found,) = owners_in(guard.scan())
    assert (found.verdict, found.code) == (Verdict.UNCLOSED, "CWG902")
    with quietly():
        kept.clear()
        gc.collect()
    (found,) = owners_in(guard.scan())
    assert (found.verdict, found.code) == (Verdict.UNCLOSED, "CWG901")
    assert found.observation.owner.name == ASYNC_CLIENTS[make][0]
    assert found.observation.record.site.function == make.__name__


@each_async_client
def test_what_is_closed_in_its_event_loop_or_still_has_it_is_not(guard, address, make):
    async def run():
        made = await make(address)
        report = await asyncio.to_thread(guard.scan)
        await getattr(made, ASYNC_CLIENTS[make][1])()
        return made, report

    kept, report = asyncio.run(run())
    assert report.findings == guard.scan().findings == ()
    del kept
    gc.collect()
    assert guard.scan().findings == ()
