"""Engines, pools and connections of databases that are not closed are found, with their line."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from test_owners import owners_in, quietly

import closewait_guard as cwg
import fake_mongo
from closewait_guard import Verdict
from servers import free_port, postgres

psycopg = pytest.importorskip("psycopg")
psycopg_pool = pytest.importorskip("psycopg_pool")
asyncpg = pytest.importorskip("asyncpg")
sqlalchemy = pytest.importorskip("sqlalchemy")
pymongo = pytest.importorskip("pymongo")
from sqlalchemy.ext.asyncio import create_async_engine  # noqa: E402

# More than `surplus` allows, also where tests before have left some threads or tasks.
MANY = 20


@pytest.fixture(scope="module")
def postgres_port():
    with postgres() as port:
        yield port


@pytest.fixture
def guard():
    gc.collect()
    with cwg.Guard(cwg.Settings(grace=0.05)) as installed:
        yield installed


def dsn(port, database="postgres"):
    return f"host=127.0.0.1 port={port} user=postgres dbname={database}"


def connect_psycopg(port, **options):
    return psycopg.connect(dsn(port, **options))


def open_pool(port, **options):
    pool = psycopg_pool.ConnectionPool(dsn(port, **options), min_size=1, open=False)
    pool.open(wait=True)
    return pool


def make_engine(port, driver="psycopg", database="postgres"):
    engine = sqlalchemy.create_engine(f"postgresql+{driver}://postgres@127.0.0.1:{port}/{database}")
    with engine.connect() as connection:
        connection.exec_driver_sql("select 1")
    return engine


def make_engine_of_psycopg2(port, **options):
    pytest.importorskip("psycopg2")
    return make_engine(port, "psycopg2", **options)


async def connect_psycopg_async(port):
    return await psycopg.AsyncConnection.connect(dsn(port))


async def open_pool_async(port):
    pool = psycopg_pool.AsyncConnectionPool(dsn(port), min_size=1, open=False)
    await pool.open(wait=True)
    return pool


async def connect_asyncpg(port):
    return await asyncpg.connect(host="127.0.0.1", port=port, user="postgres")


async def open_pool_of_asyncpg(port):
    return await asyncpg.create_pool(host="127.0.0.1", port=port, user="postgres", min_size=1)


async def make_engine_async(port):
    engine = create_async_engine(f"postgresql+asyncpg://postgres@127.0.0.1:{port}/postgres")
    async with engine.connect() as connection:
        await connection.exec_driver_sql("select 1")
    return engine


SYNC = {
    connect_psycopg: ("psycopg.Connection", "close", "psycopg.connect(...) as connection"),
    open_pool: ("psycopg_pool.ConnectionPool", "close", "pool.close()"),
    make_engine: ("sqlalchemy.Engine", "dispose", "engine.dispose()"),
    make_engine_of_psycopg2: ("sqlalchemy.Engine", "dispose", "engine.dispose()"),
}
ASYNC = {
    connect_psycopg_async: ("psycopg.AsyncConnection", "close", "connection.close()"),
    open_pool_async: ("psycopg_pool.AsyncConnectionPool", "close", "pool.close()"),
    connect_asyncpg: ("asyncpg.Connection", "close", "connection.close()"),
    open_pool_of_asyncpg: ("asyncpg.Connection", "close", "pool.close()"),
    make_engine_async: ("sqlalchemy.Engine", "dispose", "engine.dispose()"),
}


def named(makers):
    return pytest.mark.parametrize("make", makers, ids=lambda function: function.__name__)


def call(make, port):
    """Make it, and run what it needs, if that is asynchronous."""
    made = make(port)
    return asyncio.run(made) if inspect.isawaitable(made) else made


@named(SYNC | ASYNC)
def test_what_is_collected_without_its_close_is_found_once_with_its_line(
    guard, postgres_port, make
):
    with quietly():
        call(make, postgres_port)
    name, _, fix = (SYNC | ASYNC)[make]
    report = guard.scan()
    (found,) = report.findings
    assert (found.verdict, found.code) == (Verdict.UNCLOSED, "CWG901")
    owner, record = found.observation.owner, found.observation.record
    assert (owner.name, owner.sockets) == (name, 1)
    assert owner.peers == (f"127.0.0.1:{postgres_port}",)
    assert record.site.function in (make.__name__, "make_engine")
    assert fix in found.hint
    assert report.coverage.failures == 0


@named(SYNC)
def test_what_is_closed_is_not(guard, postgres_port, make):
    for _ in range(3):
        made = make(postgres_port)
        getattr(made, SYNC[make][1])()
    with psycopg.connect(dsn(postgres_port)), open_pool(postgres_port) as pool:
        with pool.connection() as connection:
            connection.execute("select 1")
    del made
    gc.collect()
    assert guard.scan().findings == ()


@named(ASYNC)
def test_what_is_closed_in_its_event_loop_is_not(guard, postgres_port, make):
    async def run():
        made = await make(postgres_port)
        await getattr(made, ASYNC[make][1])()

    with quietly():
        asyncio.run(run())
    assert guard.scan().findings == ()


def test_a_connection_that_the_server_has_ended_is_not(guard, postgres_port):
    lost = [connect_psycopg(postgres_port) for _ in range(3)]
    for each in lost:
        with suppress(psycopg.OperationalError):
            each.execute("select pg_terminate_backend(pg_backend_pid())")
    lost.pop().close()
    del each
    lost.pop()
    gc.collect()
    report = guard.scan()
    assert (report.findings, report.coverage.failures) == ((), 0)


@named(SYNC)
def test_one_for_each_call_that_is_kept_is_more_than_is_needed(guard, postgres_port, make):
    kept = [make(postgres_port) for _ in range(MANY)]
    found = owners_in(guard.scan())
    assert [(each.verdict, each.code) for each in found] == [(Verdict.SURPLUS, "CWG903")] * MANY
    assert {each.observation.owner.name for each in found} == {SYNC[make][0]}
    for each in kept:
        getattr(each, SYNC[make][1])()
    kept.clear()
    gc.collect()
    assert guard.scan().findings == ()


@named(SYNC)
def test_one_for_each_database_of_a_server_is_not(guard, postgres_port, make):
    names = [f"shard{number}" for number in range(MANY // 2)]
    with psycopg.connect(dsn(postgres_port), autocommit=True) as connection:
        for name in names:
            connection.execute(f"create database {name}")
        kept = [make(postgres_port, database=name) for name in names]
        assert guard.scan().findings == ()
        for each in kept:
            getattr(each, SYNC[make][1])()
        for name in names:
            connection.execute(f"drop database {name} with (force)")


@named(ASYNC)
def test_what_outlives_its_event_loop_is_found_while_it_is_kept(guard, postgres_port, make):
    with quietly():
        kept = call(make, postgres_port)
    found = owners_in(guard.scan())
    if make is connect_psycopg_async:
        # It does not show its loop.
        assert found == []
    else:
        (only,) = found
        assert (only.verdict, only.code) == (Verdict.UNCLOSED, "CWG902")
        assert only.observation.owner.name == ASYNC[make][0]
    with quietly():
        del kept


def test_the_connections_that_a_pool_or_an_engine_has_made_are_its_own(guard, postgres_port):
    """However many: they are what it was asked for."""
    with psycopg_pool.ConnectionPool(dsn(postgres_port), min_size=MANY, open=True) as pool:
        pool.wait()
        assert guard.scan().findings == ()
    engine = make_engine(postgres_port)
    connections = [engine.connect() for _ in range(15)]
    assert guard.scan().findings == ()
    for connection in connections:
        connection.close()
    engine.dispose()


def test_the_connections_of_a_pool_of_asyncpg_are_not_too_many(guard, postgres_port):
    async def run():
        options = {"host": "127.0.0.1", "port": postgres_port, "user": "postgres"}
        async with asyncpg.create_pool(min_size=MANY + 3, max_size=MANY + 3, **options):
            return await asyncio.to_thread(guard.scan)

    assert asyncio.run(run()).findings == ()


def test_connections_in_a_transaction_are_at_work(guard, postgres_port):
    kept = [connect_psycopg(postgres_port) for _ in range(MANY)]
    for connection in kept:
        connection.execute("select 1")
    assert guard.scan().findings == ()
    for connection in kept:
        connection.close()


# MongoDB.


@pytest.fixture
def mongo_port():
    """Of a server in another process: its threads might need clients of their own here."""
    command = [sys.executable, fake_mongo.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield int(process.stdout.readline())
        process.stdin.close()
    deadline = time.monotonic() + 30
    for thread in threading.enumerate():
        if thread.name.startswith("pymongo_"):
            thread.join(max(0.0, deadline - time.monotonic()))


def ping(port):
    client = pymongo.MongoClient("127.0.0.1", port, serverSelectionTimeoutMS=30_000)
    client.admin.command("ping")
    return client


def test_a_client_of_mongodb_that_is_collected_is_found(guard, mongo_port):
    with quietly():
        ping(mongo_port)
    (found,) = owners_in(guard.scan())
    assert (found.verdict, found.code) == (Verdict.UNCLOSED, "CWG901")
    owner = found.observation.owner
    assert owner.name == "pymongo.MongoClient"
    assert owner.sockets >= 1
    assert owner.peers == (f"127.0.0.1:{mongo_port}",)
    assert found.observation.record.site.function == "ping"
    assert "client.close()" in found.hint


def test_a_client_of_mongodb_that_is_closed_or_has_never_connected_is_not(guard, mongo_port):
    ping(mongo_port).close()
    with ping(mongo_port):
        pass
    with quietly():
        refused = pymongo.MongoClient("127.0.0.1", free_port(), serverSelectionTimeoutMS=100)
        with pytest.raises(pymongo.errors.ServerSelectionTimeoutError):
            refused.admin.command("ping")
        del refused
        pymongo.MongoClient("127.0.0.1", mongo_port, connect=False)
    assert owners_in(guard.scan()) == []


def test_a_client_of_mongodb_for_each_call_that_is_kept_is_more_than_is_needed(guard, mongo_port):
    """Their own threads do not count as some that may need one."""
    kept = [ping(mongo_port) for _ in range(MANY)]
    found = owners_in(guard.scan())
    for each in kept:
        each.close()
    assert [each.verdict for each in found] == [Verdict.SURPLUS] * MANY
    assert owners_in(guard.scan()) == []


def test_two_calls_in_one_line_are_one_line(guard, postgres_port):
    # As one call has two offsets, before the interpreter has specialized it and after.
    kept = [
        connection
        for _ in range(MANY // 2)
        for connection in (connect_psycopg(postgres_port), connect_psycopg(postgres_port))
    ]
    found = owners_in(guard.scan())
    for each in kept:
        each.close()
    assert [each.verdict for each in found] == [Verdict.SURPLUS] * MANY


def test_a_block_fails_for_what_is_garbage_at_its_end(postgres_port):
    for make in (open_pool, make_engine):
        with quietly(), pytest.raises(cwg.SocketLeakError, match=SYNC[make][0]):
            with cwg.no_leaks(grace=0.05):
                make(postgres_port)


@pytest.mark.parametrize("make", SYNC, ids=lambda function: function.__name__)
def test_a_block_fails_for_what_it_keeps_open_and_names_its_line(postgres_port, make):
    name, close = SYNC[make][:2]
    with pytest.raises(cwg.SocketLeakError) as failed:
        with cwg.no_leaks(grace=0.05):
            kept = make(postgres_port)
    [found] = failed.value.report.findings
    assert (found.verdict, found.code) == (Verdict.OPEN, "CWG706")
    assert found.observation.owner.name == name
    assert make.__name__.startswith(found.observation.record.site.function)
    assert "kept" in found.holders[0]
    getattr(kept, close)()
    # Healthy connections may stay open, and what is closed is none.
    with cwg.no_leaks(grace=0.05, allow_open=True):
        kept = make(postgres_port)
    with cwg.no_leaks(grace=0.05):
        getattr(kept, close)()
        getattr(make(postgres_port), close)()


SUITE = """
import psycopg_pool
import sqlalchemy

def test_that_leaves_a_pool():
    psycopg_pool.ConnectionPool({dsn!r}, min_size=1, open=False).open(wait=True)

def test_between():
    pass

def test_that_leaves_an_engine():
    with sqlalchemy.create_engine({url!r}).connect() as connection:
        connection.exec_driver_sql("select 1")

def test_after():
    pass

def test_that_keeps_an_engine():
    test_that_keeps_an_engine.kept = sqlalchemy.create_engine({url!r})
    with test_that_keeps_an_engine.kept.connect() as connection:
        connection.exec_driver_sql("select 1")

def test_last():
    pass
"""


def test_pytest_fails_the_test_that_leaves_or_keeps_a_pool_or_an_engine(suite, postgres_port):
    url = f"postgresql+psycopg://postgres@127.0.0.1:{postgres_port}/postgres"
    text = SUITE.format(dsn=dsn(postgres_port), url=url)
    result = suite.fail(text, "-p", "no:randomly", "-v", apart=True)
    result.assert_outcomes(passed=6, errors=3)
    result.stdout.fnmatch_lines(
        [
            "*::test_that_leaves_a_pool ERROR*",
            "*::test_between PASSED*",
            "*::test_that_leaves_an_engine ERROR*",
            "*::test_after PASSED*",
            "*::test_that_keeps_an_engine ERROR*",
            "*::test_last PASSED*",
        ]
    )
