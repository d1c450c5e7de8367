"""Connections that were taken from a pool and not given back, with the line that took them."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, contextmanager, suppress

import asyncpg
import jsonschema
import psycopg
import psycopg_pool
import pytest
import redis
import redis.asyncio
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import closewait_guard as cwg
from closewait_guard import AlertKind, Origin, Severity, Verdict
from closewait_guard.reporters import changes
from closewait_guard.testing import CapturingReporter
from findings import findings_of
from schema import SCHEMA
from servers import postgres, redis_server

SELECT = sqlalchemy.text("select 1")
# No test waits for so long.
LONG = 3600.0


@pytest.fixture(scope="module")
def address():
    with postgres() as port:
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"


@pytest.fixture(scope="module")
def redis_port():
    with redis_server() as port:
        yield port


@contextmanager
def engine_at(address, **options):
    engine = sqlalchemy.create_engine(address, **{"pool_size": 2, "max_overflow": 0, **options})
    try:
        yield engine
    finally:
        engine.dispose()


def hang_up(address):
    with psycopg.connect(address.replace("+psycopg", "")) as admin:
        admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where pid <> pg_backend_pid() and backend_type = 'client backend'"
        )


def take_session(engine):
    session = Session(engine)
    session.execute(SELECT)
    return session


def take_connection(engine):
    return engine.connect()


def take_raw_connection(engine):
    return engine.raw_connection()


TAKING = {function.__name__: function for function in (take_session, take_connection)}
TAKING["take_raw_connection"] = take_raw_connection


@pytest.mark.parametrize("name", TAKING)
def test_what_is_out_for_long_has_the_line_that_took_it_not_that_of_the_pool(address, name):
    with engine_at(address) as engine, cwg.Guard(cwg.Settings(checkout_grace=0)) as guard:
        with engine.connect():
            pass
        taken = TAKING[name](engine)
        report = guard.scan()
        [found] = report.findings
        assert (found.verdict, found.severity, found.code) == (
            Verdict.CHECKED_OUT,
            Severity.INFO,
            "CWG904",
        )
        assert report.leaks == ()
        seen, record = found.observation, found.observation.record
        assert (record.origin, record.site.function) == (Origin.CHECKED_OUT, name)
        assert (record.thread, record.task) == ("MainThread", None)
        assert (seen.state, seen.peer) == (cwg.State.ESTABLISHED, seen.peer)
        assert (seen.checkout.library, seen.checkout.pool) == ("sqlalchemy", "SQLAlchemy QueuePool")
        assert (seen.checkout.out, seen.checkout.max_size) == (1, 2)
        assert "give it back" in found.hint
        assert "'taken' of" in found.holders[0]
        text = " ".join(cwg.render_text(report).split())
        assert "1 CHECKED OUT TCP to 127.0.0.1:" in text
        assert " taken " in text
        assert "SQLAlchemy QueuePool: 1 of 2 checked out" in text
        taken.close()
        assert guard.scan().findings == ()


def test_what_is_not_out_for_long_is_no_finding(address):
    with engine_at(address) as engine, cwg.Guard() as guard, take_session(engine):
        assert guard.scan().findings == ()


def test_a_leaked_connection_has_the_line_that_took_it(address):
    def opens_first(engine):
        with engine.connect():
            pass

    with engine_at(address) as engine, cwg.Guard(cwg.Settings(grace=0.05)) as guard:
        guard.attribute("psycopg")
        opens_first(engine)
        with cwg.label("nightly"):
            taken = take_session(engine)
        hang_up(address)
        [leak] = findings_of(guard, Verdict.LEAKED)
        record = leak.observation.record
        assert record.site.function == "take_session"
        assert record.parent.site.function.endswith("opens_first")
        assert (record.labels, record.origin) == (("nightly",), Origin.CHECKED_OUT)
        assert leak.code == "CWG112"
        assert "give it back" in leak.hint
        assert leak.observation.checkout.pool == "SQLAlchemy QueuePool"
        assert not any("checked out of" in holder for holder in leak.holders)
        text = " ".join(cwg.render_text(guard.scan()).split())
        assert "opened by the pool at" in text
        assert "ago, and not given back CLOSE_WAIT for" in text
        taken.invalidate()


def test_an_idle_connection_of_the_pool_is_nobodys(address):
    with engine_at(address) as engine, cwg.Guard(cwg.Settings(grace=0.05)) as guard:
        with take_session(engine):
            pass
        hang_up(address)
        [stale] = findings_of(guard, Verdict.STALE_POOL)
        assert stale.observation.checkout is None


def test_a_task_of_an_asynchronous_engine_is_named_with_its_line(address):
    async def take(engine):
        session = AsyncSession(engine)
        await session.execute(SELECT)
        return session

    async def main():
        engine = create_async_engine(address, pool_size=1, max_overflow=0)
        taken = await asyncio.create_task(take(engine), name="refresh")
        report = guard.scan()
        await taken.close()
        await engine.dispose()
        return report

    with cwg.Guard(cwg.Settings(checkout_grace=0)) as guard:
        report = asyncio.run(main())
    [found] = [each for each in report.findings if each.verdict is Verdict.CHECKED_OUT]
    record, checkout = found.observation.record, found.observation.checkout
    assert record.site.function.endswith("take")
    assert record.task == "refresh"
    assert (checkout.pool, checkout.max_size) == ("SQLAlchemy AsyncAdaptedQueuePool", 1)


def test_every_line_is_found_also_of_the_check_out_with_which_stacks_are_shared(address):
    async def main():
        engine = create_async_engine(address, pool_size=1, max_overflow=0)
        for _ in range(300):
            async with engine.connect():
                table = guard._registry.owners.checkouts
                [out] = table.open_checkouts()
                functions.add(cwg_site(out))
        await engine.dispose()

    def cwg_site(out):
        from closewait_guard._inspect import record_of

        return record_of(out.creation, os.getpid()).site.function.rpartition(".")[2]

    functions = set()
    with cwg.Guard() as guard:
        asyncio.run(main())
    assert functions == {"main"}


def test_what_is_collected_detached_or_invalidated_is_not_out(address):
    with engine_at(address) as engine, cwg.Guard(cwg.Settings(checkout_grace=0)) as guard:
        take_session(engine)
        gc.collect()
        assert guard.scan().findings == ()
        detached = engine.raw_connection()
        detached.detach()
        assert guard.scan().findings == ()
        detached.close()
        invalid = engine.raw_connection()
        invalid.invalidate()
        assert guard.scan().findings == ()


def test_a_pool_that_is_used_by_many_threads_is_silent(address):
    def use():
        while not stop.is_set():
            with suppress(sqlalchemy.exc.TimeoutError), take_session(engine):
                pass

    stop = threading.Event()
    threads = [threading.Thread(target=use) for _ in range(4)]
    with engine_at(address) as engine, cwg.Guard(cwg.Settings(checkout_grace=30)) as guard:
        for thread in threads:
            thread.start()
        reports = []
        for _ in range(20):
            reports.append(guard.report())
            time.sleep(0.02)
        stop.set()
        for thread in threads:
            thread.join()
    assert {each.findings for each in reports} == {()}
    assert {each.alerts for each in reports} == {()}


def test_a_full_pool_says_who_has_its_connections(address):
    with engine_at(address) as engine, cwg.Guard() as guard:
        first, second = take_session(engine), take_connection(engine)
        [pool] = guard.scan().full_pools
        assert pool.name.startswith("SQLAlchemy QueuePool to 127.0.0.1:")
        assert pool.max_size == 2
        assert sorted(pool.sites.values()) == [1, 1]
        assert pool.oldest_for >= pool.full_for >= 0
        first.close()
        assert guard.scan().full_pools == ()
        second.close()


def test_what_is_given_back_after_all_is_news(address):
    reporter = CapturingReporter()
    settings = cwg.Settings(checkout_grace=0)
    with engine_at(address) as engine, cwg.Guard(settings, [changes(reporter)]) as guard:
        taken = take_session(engine)
        for _ in range(2):
            guard.report()
        [report] = reporter.reports
        assert [each.verdict for each in report.findings] == [Verdict.CHECKED_OUT]
        taken.close()
        guard.report()
        [late] = reporter.reports[-1].closed_late
        assert late.finding.verdict is Verdict.CHECKED_OUT
        text = " ".join(cwg.render_text(reporter.reports[-1]).split())
        assert "GIVEN BACK LATE, after" in text
        assert "1 socket checked out at" in text


def test_what_leaks_meanwhile_was_not_given_back(address):
    settings = cwg.Settings(checkout_grace=0, grace=0)
    with engine_at(address) as engine, cwg.Guard(settings) as guard:
        taken = take_session(engine)
        guard.report()
        hang_up(address)
        findings_of(guard, Verdict.LEAKED)
        assert guard.report().closed_late == ()
        taken.invalidate()


def test_a_report_with_it_is_the_same_as_json_and_fits_the_schema(address):
    with engine_at(address) as engine, cwg.Guard(cwg.Settings(checkout_grace=0)) as guard:
        taken = [take_session(engine), take_session(engine)]
        report = guard.scan()
        for each in taken:
            each.close()
    data = json.loads(json.dumps(cwg.to_dict(report)))
    jsonschema.validate(data, SCHEMA)
    assert cwg.from_dict(data) == report
    assert data["full_pools"][0]["max_size"] == 2
    assert {each["observation"]["record"]["origin"] for each in data["findings"]} == {"checked_out"}


def test_a_redact_callable_gets_the_names_of_pools(address):
    settings = cwg.Settings(checkout_grace=0, redact=lambda text: text.replace("SQLAlchemy", "it"))
    with engine_at(address) as engine, cwg.Guard(settings) as guard:
        taken = [take_session(engine), take_session(engine)]
        report = guard.scan()
        for each in taken:
            each.close()
    assert report.full_pools[0].name.startswith("it QueuePool")
    assert {each.observation.checkout.pool for each in report.findings} == {"it QueuePool"}


@pytest.mark.parametrize("allow_open", [False, True])
def test_a_block_must_give_back_what_it_has_taken(address, allow_open):
    with engine_at(address) as engine, cwg.Guard() as guard:
        with engine.connect():
            pass
        with guard.no_leaks(allow_open=allow_open), take_session(engine):
            pass
        taken = []
        with (
            pytest.raises(cwg.SocketLeakError) as caught,
            guard.no_leaks(grace=0, allow_open=allow_open),
        ):
            taken.append(take_session(engine))
        [found] = caught.value.report.findings
        assert found.observation.record.site.function == "take_session"
        assert "1 CHECKED OUT" in str(caught.value)
        # What was out before is not the block's.
        with guard.no_leaks(grace=0, allow_open=allow_open):
            pass
        taken[0].close()


def test_a_block_that_opens_a_connection_and_keeps_it_has_one_finding(address):
    with engine_at(address) as engine, cwg.Guard() as guard:
        guard.attribute("psycopg")
        taken = []
        with pytest.raises(cwg.SocketLeakError) as caught, guard.no_leaks(grace=0):
            taken.append(take_session(engine))
        assert [each.verdict for each in caught.value.report.findings] == [Verdict.CHECKED_OUT]
        taken[0].close()


def test_a_connection_without_a_socket_is_no_concern_of_a_block(tmp_path):
    with engine_at(f"sqlite:///{tmp_path}/shop.db") as engine, cwg.Guard() as guard:
        with guard.no_leaks(grace=0):
            taken = take_session(engine)
        taken.close()


def test_a_connection_without_a_socket_is_found_when_it_is_out_for_long(tmp_path):
    settings = cwg.Settings(checkout_grace=0)
    with engine_at(f"sqlite:///{tmp_path}/shop.db") as engine, cwg.Guard(settings) as guard:
        taken = take_session(engine)
        report = guard.scan()
        assert [each.verdict for each in report.findings] == [Verdict.CHECKED_OUT]
        assert "CHECKED OUT  SQLAlchemy QueuePool " in str(report)
        taken.close()


def test_uninstalling_leaves_the_events_of_pools_as_they_were(address):
    with engine_at(address) as engine:
        with cwg.Guard():
            assert engine.pool.dispatch.checkout
        for name in ("checkout", "checkin", "detach"):
            assert not getattr(engine.pool.dispatch, name)


IMPORTED_LATER = """
import closewait_guard as cwg
guards = [cwg.Guard().install() for _ in range(2)]
import asyncpg, psycopg_pool, redis, redis.asyncio, sqlalchemy
pools = {
    redis.ConnectionPool: "get_connection release",
    redis.asyncio.ConnectionPool: "get_connection release",
    asyncpg.Pool: "_acquire release",
    psycopg_pool.ConnectionPool: "getconn putconn",
    psycopg_pool.AsyncConnectionPool: "getconn putconn",
}
places = {vars(cls)[name].__code__.co_filename for cls in pools for name in pools[cls].split()}
queue = sqlalchemy.QueuePool(lambda: None)
print(places == {cwg._capture.owner_hooks.__file__}, bool(queue.dispatch.checkout))
for guard in guards:
    guard.uninstall()
places = {vars(cls)[name].__code__.co_filename for cls in pools for name in pools[cls].split()}
print(cwg._capture.owner_hooks.__file__ in places, bool(queue.dispatch.checkout))
"""


def test_pools_that_are_imported_after_the_installation_are_recorded_by_all_guards():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_LATER],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["True", "True", "False", "False"], done.stderr


def test_what_was_taken_while_nothing_was_recorded_is_not_known(address):
    with engine_at(address) as engine:
        guard = cwg.Guard(cwg.Settings(checkout_grace=0)).install()
        taken = take_session(engine)
        guard.uninstall()
        taken.close()
        taken = take_session(engine)
        guard.install()
        assert guard.scan().findings == ()
        taken.close()
        guard.uninstall()


def test_without_stacks_it_is_found_without_a_line(address):
    settings = cwg.Settings(checkout_grace=0, stack_depth=0)
    with engine_at(address) as engine, cwg.Guard(settings) as guard:
        taken = take_session(engine)
        [found] = guard.scan().findings
        assert found.observation.record.stack == ()
        taken.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork()")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_taken_nothing(address):
    with engine_at(address) as engine, cwg.Guard(cwg.Settings(checkout_grace=0)) as guard:
        taken = take_session(engine)
        pid = os.fork()
        if not pid:
            verdicts = {each.verdict for each in guard.scan().findings}
            os._exit(Verdict.CHECKED_OUT in verdicts)
        assert os.waitpid(pid, 0)[1] == 0
        taken.close()


def test_a_series_raises_the_alert_once_and_ends_it(address, monkeypatch):
    monkeypatch.setattr("closewait_guard._judge.alerts._MAX_FULL", 0.0)
    with engine_at(address) as engine, cwg.Guard() as guard:
        taken = [take_session(engine), take_session(engine)]
        [raised] = guard.report().alerts
        assert (raised.kind, raised.code) == (AlertKind.POOL_EXHAUSTED, "CWG807")
        assert "2 of 2 connections of SQLAlchemy QueuePool to 127.0.0.1:" in raised.message
        assert f"2 at {__file__}:" in raised.message
        assert guard.report().alerts == ()
        for each in taken:
            each.close()
        [over] = guard.report().alerts
        assert over.status is cwg.AlertStatus.RESOLVED
        assert "given back again" in over.message


@asynccontextmanager
async def psycopg_pool_at(address):
    # In a thread: closing it waits for its workers.
    pool = psycopg_pool.ConnectionPool(address, min_size=1, max_size=2, open=True)
    try:
        yield pool, pool.getconn, pool.putconn
    finally:
        pool.close()


@asynccontextmanager
async def asynchronous_psycopg_pool_at(address):
    async with psycopg_pool.AsyncConnectionPool(address, min_size=1, max_size=2) as pool:
        yield pool, pool.getconn, pool.putconn


@asynccontextmanager
async def asyncpg_pool_at(address):
    async with asyncpg.create_pool(address, min_size=1, max_size=2) as pool:
        yield pool, pool.acquire, pool.release


@asynccontextmanager
async def redis_pool_at(port):
    pool = redis.BlockingConnectionPool(port=port, max_connections=2)
    try:
        yield pool, pool.get_connection, pool.release
    finally:
        pool.disconnect()


@asynccontextmanager
async def asynchronous_redis_pool_at(port):
    pool = redis.asyncio.ConnectionPool(port=port, max_connections=2)
    try:
        yield pool, pool.get_connection, pool.release
    finally:
        await pool.disconnect()


OTHERS = {
    "redis": redis_pool_at,
    "redis asynchronous": asynchronous_redis_pool_at,
    "psycopg_pool": psycopg_pool_at,
    "psycopg_pool asynchronous": asynchronous_psycopg_pool_at,
    "asyncpg": asyncpg_pool_at,
}


def functions_of(record):
    return {frame.function.rpartition(".")[2] for frame in record.stack}


async def wait_for(result):
    return await result if inspect.isawaitable(result) else result


@pytest.fixture
def place_of(request):
    def find(name):
        if name.startswith("redis"):
            return request.getfixturevalue("redis_port")
        return request.getfixturevalue("address").replace("+psycopg", "")

    return find


@pytest.mark.parametrize("name", OTHERS)
def test_the_pools_of_other_libraries_are_recorded_alike(place_of, name):
    async def take(acquire):
        return await wait_for(acquire())

    async def main():
        async with OTHERS[name](place_of(name)) as (_, acquire, give_back):
            await wait_for(give_back(await take(acquire)))
            assert guard.scan().findings == ()
            taken = [await take(acquire), await take(acquire)]
            full = guard.scan()
            await wait_for(give_back(taken.pop()))
            report = guard.scan()
            await wait_for(give_back(taken.pop()))
            assert guard.scan().findings == ()
            return full, report

    with cwg.Guard(cwg.Settings(checkout_grace=0)) as guard:
        full, report = asyncio.run(main())
    [pool] = full.full_pools
    assert (pool.max_size, list(pool.sites.values())) == (2, [2])
    [found] = report.findings
    seen, library = found.observation, name.partition(" ")[0]
    assert found.verdict is Verdict.CHECKED_OUT
    assert (seen.checkout.library, seen.checkout.out, seen.checkout.max_size) == (library, 1, 2)
    assert "take" in functions_of(seen.record)
    assert (seen.state, seen.peer.partition(":")[0]) == (cwg.State.ESTABLISHED, "127.0.0.1")
    assert "give it back" in found.hint
    assert "pool." in found.hint


# asyncpg closes one as soon as its loop sees the end.
@pytest.mark.parametrize("name", [name for name in OTHERS if "psycopg" in name])
def test_a_leaked_connection_of_another_library_has_the_line_that_took_it(address, name):
    async def take(acquire):
        return await wait_for(acquire())

    async def main():
        plain = address.replace("+psycopg", "")
        async with OTHERS[name](plain) as (_, acquire, give_back):
            taken = await take(acquire)
            await asyncio.to_thread(hang_up, address)
            leaks = findings_of(guard, Verdict.LEAKED)
            with suppress(Exception):
                await wait_for(give_back(taken))
            return leaks

    with cwg.Guard(cwg.Settings(grace=0.05)) as guard:
        leaks = asyncio.run(main())
    assert {each.code for each in leaks} == {"CWG112"}
    assert all("take" in functions_of(each.observation.record) for each in leaks)


@pytest.mark.parametrize("name", OTHERS)
def test_uninstalling_leaves_the_methods_of_pools_as_they_were(name):
    cls, methods = {
        "psycopg_pool": (psycopg_pool.ConnectionPool, ("getconn", "putconn")),
        "psycopg_pool asynchronous": (psycopg_pool.AsyncConnectionPool, ("getconn", "putconn")),
        "asyncpg": (asyncpg.Pool, ("_acquire", "release")),
        "redis": (redis.ConnectionPool, ("get_connection", "release")),
        "redis asynchronous": (redis.asyncio.ConnectionPool, ("get_connection", "release")),
    }[name]
    before = [vars(cls)[each] for each in methods]
    with cwg.Guard():
        during = [vars(cls)[each] for each in methods]
        kinds = [inspect.iscoroutinefunction(each) for each in during]
    assert [vars(cls)[each] for each in methods] == before
    assert not set(before) & set(during)
    assert kinds == [inspect.iscoroutinefunction(each) for each in before]


def test_a_subscription_and_a_command_of_redis_may_wait_for_any_time(redis_port):
    pool = redis.ConnectionPool(port=redis_port, max_connections=3)
    client = redis.Redis(connection_pool=pool)
    waiting = threading.Thread(target=client.blpop, args=("nothing",), kwargs={"timeout": 60})
    with cwg.Guard(cwg.Settings(checkout_grace=0)) as guard:
        with client.pubsub() as subscription:
            subscription.subscribe("prices")
            waiting.start()
            end = time.monotonic() + 30
            while len(guard._registry.owners.checkouts.open_checkouts()) < 2:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert guard.scan().findings == ()
            taken = pool.get_connection()
            report = guard.scan()
            [found] = report.findings
            assert sum(report.full_pools[0].sites.values()) == 3
            assert found.observation.record.site.function == (
                "test_a_subscription_and_a_command_of_redis_may_wait_for_any_time"
            )
            pool.release(taken)
            client.rpush("nothing", "something")
            waiting.join(30)
        assert guard.scan().findings == ()
    pool.disconnect()


def test_a_connection_that_is_given_back_by_a_keyword_is_back(redis_port):
    pool = redis.ConnectionPool(port=redis_port)
    with cwg.Guard(cwg.Settings(checkout_grace=0)) as guard:
        pool.release(connection=pool.get_connection())
        assert guard.scan().findings == ()
    pool.disconnect()


def test_what_a_pool_refuses_is_refused_as_ever(address):
    plain = address.replace("+psycopg", "")
    with psycopg_pool.ConnectionPool(plain, min_size=1, open=True) as pool, cwg.Guard():
        with psycopg.connect(plain) as stranger, pytest.raises(ValueError, match="pool"):
            pool.putconn(stranger)


SUITE = """
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

@pytest.fixture(scope="session")
def engine():
    engine = create_engine({address!r})
    with engine.connect():
        pass
    yield engine
    engine.dispose()

@pytest.fixture
def session(engine):
    with Session(engine) as session:
        yield session

@pytest.fixture(scope="module")
def wide(engine):
    with engine.connect() as connection:
        yield connection

def test_that_gives_back(session, wide):
    session.execute(text("select 1"))

def test_that_keeps(engine):
    keep(Session(engine)).execute(text("select 1"))

def test_after(session, wide):
    session.execute(text("select 1"))
    for each in KEPT:
        each.close()
"""


def test_pytest_fails_the_test_that_keeps_a_connection_and_no_other(suite, address):
    # Apart: here, what the suite needs is loaded already.
    result = suite.fail(SUITE.format(address=address), "-p", "no:randomly", apart=True)
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_that_keeps*",
            "NOT GIVEN BACK  TCP to 127.0.0.1:*CWG904",
            "  taken    test_it.py:* in test_that_keeps()",
            "*(not given back): leaked 1 socket",
        ]
    )
