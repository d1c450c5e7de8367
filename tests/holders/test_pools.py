"""A connection that waits in a pool is explained, one that was never returned is a leak."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
import weakref
from contextlib import contextmanager

import aiohttp
import botocore.config
import botocore.session
import httpx
import pytest
import redis
import redis.asyncio
import requests
import urllib3

import closewait_guard as cwg
from closewait_guard._holders import libraries
from closewait_guard._live import shows_other_threads, walk
from findings import are_of_a_pool_for_each_call, findings_of, findings_of_async, opened_in
from servers import redis_server, web

HINT_OF = {
    "urllib3": "the pool discards it on next use",
    "httpcore": "keepalive_expiry",
    "aiohttp": "keepalive_timeout",
    "redis": "health_check_interval",
    "SQLAlchemy": "pool_pre_ping",
}


def assert_explained(guard, finding, sentence):
    assert not finding.is_leak
    assert finding.severity is cwg.Severity.INFO
    assert sentence in finding.holders[-1]
    library = finding.holders[-1].split()[0]
    assert HINT_OF[library] in finding.hint
    report = guard.scan()
    # Nothing is to be done about it: it is counted, and explained to whoever asks for everything.
    summary = " ".join(cwg.render_text(report).split())
    assert "1 idle pooled connection closed by the server" in summary
    assert "STALE POOL" not in summary
    block = " ".join(cwg.render_text(report, everything=True).split())
    assert "1 STALE POOL" in block
    assert " held by " in block
    assert sentence in block


def test_urllib3_idle_is_stale_and_unread_is_leaked(guard):
    with web() as server, urllib3.PoolManager(maxsize=7) as manager:
        manager.request("GET", server.url)
        unread = manager.request("GET", server.url + "/partial", preload_content=False)
        server.hang_up()
        [leak] = [] if unread._connection is None else findings_of(guard, cwg.Verdict.LEAKED)
        assert leak.observation.checkout.pool == f"urllib3 pool of {server.url}"
        assert "release_conn" in leak.hint
        unread.close()
        manager.request("GET", server.url)
        server.hang_up()
        [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
        assert_explained(
            guard, stale, f"urllib3 pool of {server.url}: idle in the pool (at most 7)"
        )


def test_requests_session_idle_is_stale_and_the_next_scan_leaves_the_heap_alone(guard, monkeypatch):
    with web() as server, requests.Session() as session:
        session.get(server.url)
        server.hang_up()
        [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
        assert_explained(guard, stale, "idle in the pool (at most 10)")
        assert guard.scan().leaks == ()
        import closewait_guard._holders.libraries as pools

        monkeypatch.setattr(
            pools, "_pool_classes", lambda: pytest.fail("went through the heap again")
        )
        assert [finding.verdict for finding in guard.scan().findings] == ["stale_pool"]


def test_a_session_for_each_call_is_leaked(guard):
    sessions = []

    def call(url):
        session = requests.Session()
        sessions.append(session)
        return session.get(url).content

    with web() as server:
        for _ in range(40):
            call(server.url)
        server.hang_up()
        leaks = opened_in(findings_of(guard, cwg.Verdict.LEAKED, 40), "call")
        assert len(leaks) == 40
        assert "one of 40 pools for this address" in leaks[0].holders[-1]
        assert any("sessions[" in holder for leak in leaks for holder in leak.holders)
        assert any("reuse one Session" in leak.hint for leak in leaks)
        for session in sessions:
            session.close()
    assert guard.scan().leaks == ()


@pytest.mark.parametrize("library", ["urllib3", "httpx"])
def test_a_client_for_each_call_is_leaked(guard, library):
    clients = []

    def with_urllib3(url):
        clients.append(urllib3.PoolManager(maxsize=2))
        return clients[-1].request("GET", url).data

    def with_httpx(url):
        clients.append(httpx.Client())
        return clients[-1].get(url).content

    call, hint = {
        "urllib3": (with_urllib3, "reuse one PoolManager"),
        "httpx": (with_httpx, "`with httpx.Client() as client:`"),
    }[library]
    with web() as server:
        for _ in range(25):
            call(server.url)
        server.hang_up()
        leaks = opened_in(findings_of(guard, cwg.Verdict.LEAKED, 25), call.__name__)
        are_of_a_pool_for_each_call(leaks, hint)
        for client in clients:
            client.clear() if library == "urllib3" else client.close()
    assert guard.scan().leaks == ()


@pytest.mark.parametrize("count", [15, 21])
def test_clients_of_one_line_are_leaked_however_many_connections_one_pool_may_hold(guard, count):
    with web() as server:
        clients = [httpx.Client() for _ in range(count)]
        for client in clients:
            client.get(server.url)
        server.hang_up()
        leaks = findings_of(guard, cwg.Verdict.LEAKED, count)
        assert f"one of {count} pools for this address" in leaks[0].holders[-1]
        assert all("reuse one" in leak.hint for leak in leaks)
        for client in clients:
            client.close()
    assert guard.scan().leaks == ()


def test_a_few_clients_of_one_line_with_settings_of_their_own_are_explained(guard):
    with web() as server:
        clients = [httpx.Client(headers={"user": str(number)}) for number in range(4)]
        for client in clients:
            client.get(server.url)
        server.hang_up()
        findings_of(guard, cwg.Verdict.STALE_POOL, 4)
        assert guard.scan().leaks == ()
        for client in clients:
            client.close()


@pytest.mark.parametrize("count", [2, 5])
def test_a_few_clients_that_one_could_replace_are_no_leak_and_are_said_to_be_more_than_needed(
    guard, count
):
    with web() as server:
        clients = [httpx.Client() for _ in range(count)]
        for client in clients:
            client.get(server.url)
        server.hang_up()
        stale = findings_of(guard, cwg.Verdict.STALE_POOL, count)
        assert {each.code for each in stale} == {"CWG705"}
        assert f"{count} clients of this line" in stale[0].hint
        assert "one would do" in stale[0].hint
        assert "reuse one client" in stale[0].hint
        assert "discards" not in stale[0].hint
        text = " ".join(cwg.render_text(guard.scan()).split())
        place = stale[0].observation.record.site.lineno
        assert f"{count} idle pooled connections closed by the server, of more clients than" in text
        assert f"test_pools.py:{place} needs" in text
        for client in clients:
            client.close()


def test_an_idle_connection_that_a_block_has_left_in_a_pool_is_still_open_and_no_all_clear(guard):
    with web() as server, httpx.Client() as client:
        with pytest.raises(cwg.SocketLeakError) as caught, guard.no_leaks(grace=0):
            client.get(server.url)
            server.hang_up()
            findings_of(guard, cwg.Verdict.STALE_POOL)
    assert cwg.Verdict.STALE_POOL in {each.verdict for each in caught.value.report.findings}
    text = str(caught.value)
    assert "1 STILL OPEN  TCP to " in text
    assert "No leaks" not in text
    assert "STALE POOL" not in text


@contextmanager
def one_client_a_thread(make_client, server, many, name=None):
    """Threads that have each made a call with a client of their own, and keep it."""
    done, stop = threading.Semaphore(0), threading.Event()

    def work():
        with make_client() as client:
            client.get(server.url)
            done.release()
            stop.wait()

    threads = [threading.Thread(target=work, name=name) for _ in range(many)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            assert done.acquire(timeout=30)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("name", [None, "worker"])
def test_clients_are_not_said_to_be_more_than_needed_where_each_is_a_threads_own(guard, name):
    with web() as server, one_client_a_thread(httpx.Client, server, 9, name):
        server.hang_up()
        stale = findings_of(guard, cwg.Verdict.STALE_POOL, 9)
        assert {each.code for each in stale} == {"CWG701"}
        assert guard.scan().leaks == ()


def test_clients_are_not_said_to_be_more_than_needed_where_each_has_an_address_of_its_own(guard):
    with web() as one, web() as other, httpx.Client() as first, httpx.Client() as second:
        for client, server in ((first, one), (second, other)):
            client.get(server.url)
        one.hang_up()
        other.hang_up()
        stale = findings_of(guard, cwg.Verdict.STALE_POOL, 2)
        assert {each.code for each in stale} == {"CWG701"}


def test_one_session_for_many_hosts_of_one_address_is_explained(guard):
    with web() as server, requests.Session() as session:
        port = server.url.rpartition(":")[2]
        for host in ("127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f.1", "0177.1", "0x7f.0.1"):
            session.get(f"http://{host}:{port}")
        server.hang_up()
        findings_of(guard, cwg.Verdict.STALE_POOL, 7)
        assert guard.scan().leaks == ()


def test_a_client_for_each_event_loop_is_explained_as_long_as_the_loops_are_open(guard):
    async def call(client, url):
        await client.get(url)

    with web() as server:
        loops = [asyncio.new_event_loop() for _ in range(12)]
        clients = [httpx.AsyncClient() for _ in loops]
        for loop, client in zip(loops, clients, strict=True):
            loop.run_until_complete(call(client, server.url))
        server.hang_up()
        stale = findings_of(guard, cwg.Verdict.STALE_POOL, 12)
        assert {each.code for each in stale} == {"CWG701"}
        assert guard.scan().leaks == ()
        for loop, client in zip(loops, clients, strict=True):
            loop.run_until_complete(client.aclose())
            loop.close()


@pytest.mark.parametrize("library", ["httpx", "aiohttp"])
def test_an_asynchronous_client_for_each_call_is_leaked(guard, library):
    clients = []

    async def with_httpx(url):
        clients.append(httpx.AsyncClient())
        return await clients[-1].get(url)

    async def with_aiohttp(url):
        clients.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=5)))
        async with clients[-1].get(url) as response:
            return await response.read()

    async def main(server):
        for _ in range(25):
            await call(server.url)
        server.hang_up()
        # The loop is busy with something else, so that it cannot see the end.
        leaks = findings_of(guard, cwg.Verdict.LEAKED, 25)
        are_of_a_pool_for_each_call(leaks, hint)
        for client in clients:
            await (client.aclose() if library == "httpx" else client.close())

    call, hint = {
        "httpx": (with_httpx, "reuse one"),
        "aiohttp": (with_aiohttp, "`await session.close()`"),
    }[library]
    with web() as server:
        asyncio.run(main(server))
    assert guard.scan().leaks == ()


def test_a_session_for_each_thread_is_explained(guard):
    with web() as server, one_client_a_thread(requests.Session, server, 20):
        server.hang_up()
        findings_of(guard, cwg.Verdict.STALE_POOL, 20)
        assert guard.scan().leaks == ()


def test_httpx_idle_is_stale_and_a_stream_never_closed_is_leaked(guard):
    with web() as server, httpx.Client() as client:
        client.get(server.url)
        server.hang_up()
        [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
        assert_explained(
            guard, stale, "httpcore pool of an httpx client: idle in the pool (at most 20)"
        )
        response = client.send(client.build_request("GET", server.url + "/partial"), stream=True)
        [leak] = findings_of(guard, cwg.Verdict.LEAKED)
        assert leak.observation.checkout.pool == "httpcore pool of an httpx client"
        assert "client.stream" in leak.hint
        response.close()
    assert guard.scan().leaks == ()


def test_httpx_async_idle_is_stale(guard):
    async def main(server):
        async with httpx.AsyncClient() as client:
            await client.get(server.url)
            server.hang_up()
            [stale] = await findings_of_async(guard, cwg.Verdict.STALE_POOL)
            assert_explained(guard, stale, "httpcore pool of an httpx client: idle in the pool")

    with web() as server:
        asyncio.run(main(server))


def test_aiohttp_closes_idle_connections_itself_and_an_unread_response_is_leaked(guard):
    async def main(server):
        async with aiohttp.ClientSession() as session:
            async with session.get(server.url) as response:
                await response.read()
            server.hang_up()
            await asyncio.sleep(0.2)
            assert guard.scan().leaks == ()
            response = await session.get(server.url + "/partial")
            response.connection.protocol.transport.pause_reading()
            [leak] = await findings_of_async(guard, cwg.Verdict.LEAKED)
            assert "aiohttp TCPConnector: checked out of the pool (at most 100)" in leak.holders[-1]
            assert "`async with session.get(...) as response:`" in leak.hint
            response.close()

    with web() as server:
        asyncio.run(main(server))


def test_the_session_that_keeps_an_idle_connection_is_named_beside_the_event_loop(guard):
    sessions = []

    async def fetch(url):
        sessions.append(aiohttp.ClientSession())
        async with sessions[0].get(url) as response:
            await response.read()

    async def main(url):
        mark = guard.mark()
        await fetch(url)
        findings = guard.check(mark).findings
        await sessions.pop().close()
        return [each.holders[0] for each in findings if each.observation.record.origin == "created"]

    with web() as server:
        [held] = asyncio.run(main(server.url))
        assert held.endswith(": sessions[0]: aiohttp.ClientSession"), held


def test_aiohttp_idle_that_the_loop_has_not_noticed_is_stale(guard):
    async def main(server):
        async with aiohttp.ClientSession() as session:
            async with session.get(server.url) as response:
                await response.read()
            server.hang_up()
            # The loop is busy with something else, so that it cannot see the end.
            [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
            assert_explained(guard, stale, "aiohttp TCPConnector: idle in the pool (at most 100)")

    with web() as server:
        asyncio.run(main(server))


def test_botocore_idle_is_stale_and_an_unread_body_is_leaked(guard, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with web() as server:
        config = botocore.config.Config(
            s3={"addressing_style": "path"}, response_checksum_validation="when_required"
        )
        client = botocore.session.Session().create_client(
            "s3", "us-east-1", endpoint_url=server.url, config=config
        )
        client.get_object(Bucket="bucket", Key="key")["Body"].read()
        server.hang_up()
        [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
        assert_explained(
            guard, stale, f"urllib3 pool of {server.url}: idle in the pool (at most 10)"
        )
        body = client.get_object(Bucket="bucket", Key="key")["Body"]
        server.hang_up()
        [leak] = findings_of(guard, cwg.Verdict.LEAKED)
        assert "body.close()" in leak.hint
        body.close()
        client.close()
    assert guard.scan().leaks == ()


@pytest.fixture(scope="module")
def redis_port():
    with redis_server() as port:
        yield port


def hang_up_redis(port):
    with redis.Redis(port=port, client_name="killer") as admin:
        admin.client_kill_filter(_type="normal", skipme=True)


def test_redis_idle_is_stale_and_a_connection_never_returned_is_leaked(guard, redis_port):
    with redis.Redis(port=redis_port, max_connections=5) as client:
        client.ping()
        hang_up_redis(redis_port)
        [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
        assert_explained(
            guard, stale, f"redis pool of localhost:{redis_port}: idle in the pool (at most 5)"
        )
        taken = client.connection_pool.get_connection()
        hang_up_redis(redis_port)
        [leak] = findings_of(guard, cwg.Verdict.LEAKED)
        checkout = leak.observation.checkout
        assert (checkout.library, checkout.out, checkout.max_size) == ("redis", 1, 5)
        assert "return the connection" in leak.hint
        client.connection_pool.release(taken)
    assert guard.scan().leaks == ()


def test_a_closed_redis_client_leaves_a_connection_only_in_a_pool_that_it_was_given(
    guard, redis_port
):
    pool = redis.ConnectionPool(port=redis_port)
    owners = [
        redis.Redis(port=redis_port),
        redis.Redis.from_url(f"redis://localhost:{redis_port}"),
        redis.Redis.from_pool(redis.ConnectionPool(port=redis_port)),
    ]
    for client in (*owners, redis.Redis(connection_pool=pool)):
        client.ping()
        client.close()
    hang_up_redis(redis_port)
    [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
    assert_explained(guard, stale, f"redis pool of localhost:{redis_port}: idle in the pool")
    assert "is closed by pool.disconnect(), not by client.close()" in stale.hint
    assert [finding.verdict for finding in guard.scan().findings] == [stale.verdict]
    pool.disconnect()
    assert guard.scan().findings == ()


def test_a_redis_client_for_each_call_is_leaked(guard, redis_port):
    clients = [redis.Redis(port=redis_port, max_connections=5) for _ in range(25)]
    for client in clients:
        client.ping()
    hang_up_redis(redis_port)
    leaks = findings_of(guard, cwg.Verdict.LEAKED, 25)
    are_of_a_pool_for_each_call(leaks, "reuse one client, which has a connection pool")
    for client in clients:
        client.close()
    assert guard.scan().leaks == ()


def test_redis_clients_of_one_line_are_leaked_though_their_pools_have_no_bound(guard, redis_port):
    clients = [redis.Redis(port=redis_port) for _ in range(60)]
    for client in clients:
        client.ping()
    hang_up_redis(redis_port)
    leaks = findings_of(guard, cwg.Verdict.LEAKED, 60)
    assert "one of 60 pools for this address" in leaks[0].holders[-1]
    assert all("reuse one" in leak.hint for leak in leaks)
    for client in clients:
        client.close()
    assert guard.scan().leaks == ()


def test_redis_asyncio_idle_is_stale(guard, redis_port):
    async def main():
        async with redis.asyncio.Redis(port=redis_port) as client:
            await client.ping()
            hang_up_redis(redis_port)
            [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
            assert_explained(
                guard, stale, f"redis pool of localhost:{redis_port}: idle in the pool"
            )

    asyncio.run(main())


def test_many_stale_connections_are_a_warning():
    with cwg.Guard(cwg.Settings(grace=0.05, count_warning=2, age_critical=0)) as guard:
        with web() as server, requests.Session() as session:
            responses = [session.get(server.url, stream=True) for _ in range(3)]
            for response in responses:
                response.content  # noqa: B018 - reading it gives the connection back
            server.hang_up()
            findings = findings_of(guard, cwg.Verdict.STALE_POOL, 3)
            assert {finding.severity for finding in findings} == {cwg.Severity.WARNING}


UNUSED = ", which nothing can use any more"
kept = []


@pytest.fixture
def small_heap(monkeypatch):
    """As in most programs, whatever other tests have left on a busy machine."""
    monkeypatch.setattr(libraries, "is_too_large", lambda: False)


@pytest.fixture
def without_collection():
    """Garbage stays as long as the test needs it; of what it then leaves open, Python warns."""
    gc.collect()
    gc.disable()
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    gc.enable()


@pytest.fixture
def kept_globally():
    yield kept
    kept.clear()


def fetch_and_close_the_session(url):
    with requests.Session() as session:
        return session.get(url)


@pytest.mark.skipif(
    not shows_other_threads(), reason="what the tests have frozen may be of another thread's call"
)
@pytest.mark.usefixtures("small_heap")
def test_a_response_that_keeps_the_pool_of_a_closed_session_excuses_nothing(guard, kept_globally):
    with web() as server:
        kept_globally.append(fetch_and_close_the_session(server.url))
        server.hang_up()
        [leak] = findings_of(guard, cwg.Verdict.LEAKED)
        assert leak.holders[-1].endswith(f"idle in the pool (at most 10){UNUSED}")
        assert "one that was read and closed keeps its pool" in leak.hint
        kept_globally.clear()
        assert guard.scan().leaks == ()


@pytest.mark.usefixtures("small_heap")
def test_an_open_session_excuses_what_a_response_keeps_too(guard, kept_globally):
    with web() as server, requests.Session() as session:
        kept_globally.append(session.get(server.url))
        server.hang_up()
        [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
        assert UNUSED not in stale.holders[-1]


@pytest.mark.usefixtures("small_heap")
def test_a_response_that_a_call_of_another_thread_has_is_a_reason_for_its_pool(guard):
    is_kept, may_end = threading.Event(), threading.Event()

    def work(url):
        response = fetch_and_close_the_session(url)
        is_kept.set()
        may_end.wait(20)
        return response.content

    with web() as server:
        thread = threading.Thread(target=work, args=(server.url,))
        thread.start()
        try:
            assert is_kept.wait(20)
            server.hang_up()
            findings_of(guard, cwg.Verdict.STALE_POOL)
        finally:
            may_end.set()
            thread.join()


def use_requests(url):
    session = requests.Session()
    session.itself = session
    session.get(url)


def use_httpx(url):
    client = httpx.Client()
    client.itself = client
    client.get(url)


@pytest.mark.usefixtures("small_heap", "without_collection")
@pytest.mark.parametrize("call", [use_requests, use_httpx])
def test_a_pool_that_only_garbage_reaches_excuses_nothing(guard, call):
    with web() as server:
        call(server.url)
        server.hang_up()
        [leak] = findings_of(guard, cwg.Verdict.LEAKED)
        assert leak.holders[-1].endswith(UNUSED)
        assert {"use_requests": "close the session", "use_httpx": "reuse one"}[
            call.__name__
        ] in leak.hint


@pytest.mark.usefixtures("without_collection")
def test_the_last_report_of_a_process_asks_what_uses_a_pool_in_a_large_heap_too(guard, monkeypatch):
    with web() as server:
        use_requests(server.url)
        server.hang_up()
        [leak] = findings_of(guard, cwg.Verdict.LEAKED)
        monkeypatch.setattr(libraries, "is_too_large", lambda: True)
        guard._pipeline._pools._answers.clear()
        assert {each.verdict for each in guard.scan().findings} == {cwg.Verdict.STALE_POOL}
        [leak] = guard._pipeline.scan(is_last=True).leaks
        assert leak.holders[-1].endswith(UNUSED)


@pytest.mark.usefixtures("small_heap", "without_collection")
def test_a_redis_pool_that_only_garbage_reaches_excuses_nothing(guard, redis_port):
    def call():
        client = redis.Redis(port=redis_port)
        client.itself = client
        client.ping()

    call()
    hang_up_redis(redis_port)
    [leak] = findings_of(guard, cwg.Verdict.LEAKED)
    assert leak.holders[-1].endswith(UNUSED)
    assert "reuse one" in leak.hint


@pytest.mark.usefixtures("small_heap")
def test_a_pool_that_only_the_registry_of_finalizers_reaches_excuses_nothing(guard):
    def call(url):
        client = httpx.Client()
        client.get(url)
        return weakref.finalize(guard, client.close)

    with web() as server:
        close = call(server.url)
        server.hang_up()
        [leak] = findings_of(guard, cwg.Verdict.LEAKED)
        assert leak.holders[-1].endswith(UNUSED)
        close()
        assert guard.scan().leaks == ()


async def hold_in_a_task(client, ready):
    ready.set()
    try:
        await asyncio.sleep(60)
    finally:
        client.close()


@pytest.mark.usefixtures("small_heap")
def test_a_pool_that_only_a_suspended_task_reaches_excuses_its_connections(guard):
    async def main(url):
        client = httpx.Client()
        await asyncio.to_thread(client.get, url)
        ready = asyncio.Event()
        task = asyncio.create_task(hold_in_a_task(client, ready))
        del client
        await ready.wait()
        server.hang_up()
        await findings_of_async(guard, cwg.Verdict.STALE_POOL)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with web() as server:
        asyncio.run(main(server.url))


def test_what_could_not_be_searched_for_excuses_its_connections_and_is_said(guard, monkeypatch):
    with web() as server, requests.Session() as session:
        session.get(server.url)
        server.hang_up()
        [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
        monkeypatch.setattr(libraries, "is_too_large", lambda: True)
        guard.uninstall()
        with cwg.Guard(cwg.Settings(grace=0.05)) as another:
            [stale] = findings_of(another, cwg.Verdict.STALE_POOL)
            notes = another.scan().coverage.notes
        assert any("whether 1 pool can still be used" in note for note in notes)
        monkeypatch.undo()


def test_what_a_walk_through_too_many_objects_may_have_missed_is_said(guard, monkeypatch):
    monkeypatch.setattr(libraries, "is_too_large", lambda: True)
    monkeypatch.setattr(walk, "_MAX_THINGS", 10)
    with web() as server, requests.Session() as session:
        session.get(server.url)
        server.hang_up()
        findings_of(guard, cwg.Verdict.LEAKED)
        with cwg.Guard(cwg.Settings(grace=0)) as another:
            notes = another.scan().coverage.notes
        said = "not all of them were found or asked, the program has too many objects"
        assert any(said in note for note in notes), notes


def hold_deep_down(url):
    session = requests.Session()
    session.get(url)
    for _ in range(30):
        session = [session]
    return session


@pytest.mark.usefixtures("small_heap")
def test_a_search_for_what_can_use_a_pool_that_goes_too_far_is_said_and_no_excuse_in_a_check(guard):
    with web() as server:
        kept = hold_deep_down(server.url)
        server.hang_up()
        [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
        notes = guard.scan().coverage.notes
        assert any("whether 1 pool can still be used" in note for note in notes), notes
        mine = [each for each in guard.check(0).findings if each.is_leak]
        [leak] = [each for each in mine if "urllib3" in each.holders[-1]]
        assert leak.holders[-1].endswith("can still use that was not found out in time")
        with pytest.raises(cwg.SocketLeakError), guard.no_leaks(0.1, allow_open=True):
            another = hold_deep_down(server.url)
            server.hang_up()
        for deep in (kept, another):
            while type(deep) is list:
                [deep] = deep
            deep.close()


def has_asked_all_pools(report):
    notes = report.coverage.notes
    return not any("can still be used" in note for note in notes)


@pytest.mark.usefixtures("small_heap")
def test_of_many_pools_each_is_asked_whether_anything_can_use_it(guard):
    sessions, others = [], [cwg.Guard(guard.settings).install() for _ in range(5)]
    with web() as server:
        for number in range(25):
            # A line of its own for each: many pools of one line would be a leak.
            code = "\n" * number + "session = requests.Session(); session.get(url)"
            sessions.append({"requests": requests, "url": server.url})
            exec(compile(code, __file__, "exec"), sessions[-1])
        server.hang_up()
        assert len(findings_of(guard, cwg.Verdict.STALE_POOL, 25)) == 25
        # On a busy machine the time for a first search may not suffice.
        assert any(has_asked_all_pools(other.scan()) for other in others)
        for each in sessions:
            each["session"].close()
    for other in others:
        other.uninstall()
