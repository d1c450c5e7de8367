"""Responses that keep a connection out of the pool of an HTTP client, with the line that asked."""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
import threading
from contextlib import asynccontextmanager, contextmanager, suppress

import httpcore
import httpx
import httpx2
import pytest
import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

import closewait_guard as cwg
from closewait_guard import AlertKind, Origin, Verdict
from findings import findings_of, findings_of_async
from servers import DEADLINE, free_port, get, web


@pytest.fixture
def server():
    with web() as served:
        yield served


@pytest.fixture
def guard():
    with cwg.Guard(cwg.Settings(checkout_grace=0, grace=0.05)) as made:
        yield made


def taken_in(guard):
    """What the guard remembers to be out, whether it is so or not."""
    return guard._registry.owners.checkouts._taken


def checked_out(report):
    """Not the ends of the server, which is in this process."""
    return [each for each in report.findings if each.observation.checkout is not None]


def streaming_session(url):
    with requests.Session() as session:
        yield session.get(url, stream=True)


def streaming_pool_manager(url):
    with urllib3.PoolManager() as manager:
        yield manager.request("GET", url, preload_content=False)


def streaming_client(url):
    with httpx.Client() as client:
        yield client.send(client.build_request("GET", url), stream=True)


def streaming_next_client(url):
    with httpx2.Client() as client:
        yield client.send(client.build_request("GET", url), stream=True)


CLIENTS = {
    function.__name__: function
    for function in (
        streaming_session,
        streaming_pool_manager,
        streaming_client,
        streaming_next_client,
    )
}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_response_that_is_kept_has_the_line_that_asked_for_it(server, guard, name):
    with contextmanager(CLIENTS[name])(server.url + "/half") as response:
        report = guard.scan()
        [found] = checked_out(report)
        seen = found.observation
        assert (found.verdict, found.code) == (Verdict.CHECKED_OUT, "CWG904")
        assert (seen.record.origin, seen.record.site.function) == (Origin.CHECKED_OUT, name)
        assert seen.peer == f"127.0.0.1:{server.port}"
        assert seen.checkout.out == 1
        assert "response.close()" in found.hint
        assert report.leaks == ()
        response.close()
        assert checked_out(guard.scan()) == []


def test_a_response_of_an_asynchronous_client_has_the_line_and_the_task(server, guard):
    async def ask(client):
        return await client.send(client.build_request("GET", server.url + "/half"), stream=True)

    async def main():
        async with httpx.AsyncClient() as client:
            response = await asyncio.create_task(ask(client), name="prices")
            report = guard.scan()
            await response.aclose()
            assert checked_out(guard.scan()) == []
        return report

    [found] = checked_out(asyncio.run(main()))
    record = found.observation.record
    assert found.verdict is Verdict.CHECKED_OUT
    assert (record.site.function.rpartition(".")[2], record.task) == ("ask", "prices")
    assert "aclose" in found.hint


def ask_requests(url):
    with requests.Session() as session:
        session.get(url)
        yield
        yield session.get(url, stream=True)


def ask_httpx(url):
    with httpx.Client() as client:
        client.get(url)
        yield
        yield client.send(client.build_request("GET", url), stream=True)


@pytest.mark.parametrize("ask", [ask_requests, ask_httpx])
def test_a_leaked_response_is_one_finding_with_the_line_that_asked(guard, ask):
    with web() as server:
        asking = ask(server.url)
        next(asking)
        response = next(asking)
        server.hang_up()
        [leak] = findings_of(guard, Verdict.LEAKED)
        record = leak.observation.record
        assert (record.origin, record.site.function) == (Origin.CHECKED_OUT, ask.__name__)
        # The first request has opened the connection.
        assert record.parent.site.lineno < record.site.lineno
        assert leak.code == "CWG104"
        assert len(guard.scan().findings) == 1
        text = " ".join(cwg.render_text(guard.scan()).split())
        assert "opened by the pool at" in text
        response.close()
        asking.close()


def test_where_the_same_line_has_opened_the_connection_it_is_shown_once(guard):
    with web() as server, requests.Session() as session:
        response = session.get(server.url, stream=True)
        server.hang_up()
        findings_of(guard, Verdict.LEAKED)
        assert "opened by the pool" not in str(guard.scan())
        response.close()


def test_a_leaked_response_of_an_asynchronous_client_is_one_finding(guard):
    async def ask(client, url):
        return await client.send(client.build_request("GET", url), stream=True)

    async def main(server):
        async with httpx.AsyncClient() as client:
            await client.get(server.url)
            response = await ask(client, server.url)
            server.hang_up()
            found = await findings_of_async(guard, Verdict.LEAKED)
            await response.aclose()
        return found

    with web() as server:
        [leak] = asyncio.run(main(server))
    assert leak.observation.record.site.function.rpartition(".")[2] == "ask"


def read_by_requests(url):
    with requests.Session() as session:
        session.get(url)
        session.get(url + "/redirect")
        assert session.get(url, stream=True).content
        assert list(session.get(url, stream=True).iter_content(100))
        with session.get(url, stream=True) as response:
            assert response.ok
        session.get(url, stream=True).close()
        with suppress(KeyError), session.get(url, stream=True) as response:
            raise KeyError
        with pytest.raises(requests.ConnectionError):
            session.get(url + "/nothing")
        with pytest.raises(requests.Timeout):
            session.get(url + "/wait", timeout=0.01)
        with pytest.raises(requests.ConnectionError, match="timed out"):
            session.get(url + "/half", timeout=0.05)
        retry = Retry(2, status_forcelist=[503], backoff_factor=0)
        session.mount("http://", HTTPAdapter(max_retries=retry))
        with pytest.raises(requests.exceptions.RetryError):
            session.get(url + "/unavailable")
        yield


def read_by_urllib3(url):
    with urllib3.PoolManager(maxsize=1, block=True, retries=Retry(2, backoff_factor=0)) as manager:
        manager.request("GET", url)
        manager.request("GET", url + "/redirect")
        response = manager.request("GET", url, preload_content=False)
        response.read()
        response = manager.request("GET", url, preload_content=False)
        assert list(response.stream(100))
        response = manager.request("GET", url, preload_content=False)
        response.drain_conn()
        response = manager.request("GET", url, preload_content=False)
        response.close()
        response.release_conn()
        with pytest.raises(urllib3.exceptions.MaxRetryError):
            manager.request("GET", url + "/nothing")
        manager.request("GET", url)
        yield


def read_by_httpx(url):
    with httpx.Client(follow_redirects=True) as client:
        client.get(url)
        client.get(url + "/redirect")
        with client.stream("GET", url) as response:
            assert response.status_code == 200
        with suppress(KeyError), client.stream("GET", url) as response:
            raise KeyError
        response = client.send(client.build_request("GET", url), stream=True)
        response.read()
        response = client.send(client.build_request("GET", url), stream=True)
        assert list(response.iter_raw())
        client.send(client.build_request("GET", url), stream=True).close()
        with pytest.raises(httpx.RemoteProtocolError):
            client.get(url + "/nothing")
        with pytest.raises(httpx.ReadTimeout):
            client.get(url + "/wait", timeout=0.01)
        with pytest.raises(httpx.ReadTimeout):
            client.get(url + "/half", timeout=0.05)
        client.get(url)
        yield


def read_by_httpcore(url):
    with httpcore.ConnectionPool() as pool:
        assert pool.request("GET", url).content
        with pool.stream("GET", url) as response:
            assert list(response.iter_stream())
        yield


@pytest.mark.parametrize(
    "reads", [read_by_requests, read_by_urllib3, read_by_httpx, read_by_httpcore]
)
def test_nothing_is_out_that_was_read_closed_or_has_failed(server, guard, reads, caplog):
    for _ in reads(server.url):
        assert guard._registry.owners.checkouts.open_checkouts() == []
        assert checked_out(guard.scan()) == []
    # What urllib3 has logged has the exception, and that the connection.
    caplog.clear()


def test_nothing_is_out_that_an_asynchronous_client_has_read_closed_or_cancelled(server, guard):
    url = server.url

    async def keep(client):
        async with client.stream("GET", url + "/half") as response:
            assert response.status_code == 200
            started.set()
            await asyncio.Event().wait()

    async def main():
        async with httpx.AsyncClient(follow_redirects=True) as client:
            await client.get(url)
            await client.get(url + "/redirect")
            async with client.stream("GET", url) as response:
                assert [each async for each in response.aiter_raw()]
            response = await client.send(client.build_request("GET", url), stream=True)
            await response.aread()
            with suppress(KeyError):
                async with client.stream("GET", url + "/half"):
                    raise KeyError
            waiting = asyncio.create_task(client.get(url + "/wait"))
            kept = asyncio.create_task(keep(client))
            await started.wait()
            for task in (waiting, kept):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            assert not taken_in(guard)

    started = asyncio.Event()
    asyncio.run(main())


def test_a_request_that_waits_for_its_answer_is_out_and_no_finding(server, guard):
    with urllib3.HTTPConnectionPool("127.0.0.1", server.port, maxsize=1, block=True) as pool:
        waiting = threading.Thread(target=pool.request, args=("GET", "/wait"))
        waiting.start()
        assert wait_until(lambda: guard.scan().full_pools)
        assert checked_out(guard.scan()) == []
        server.released.set()
        waiting.join(DEADLINE)
        assert guard.scan().full_pools == ()


def test_a_block_does_not_answer_for_a_request_of_another_thread(server, guard):
    with requests.Session() as session:
        session.get(server.url)
        waiting = threading.Thread(target=session.get, args=(server.url + "/wait",))
        with guard.no_leaks(grace=0, allow_open=True):
            waiting.start()
            assert wait_until(lambda: taken_in(guard))
            assert wait_until(lambda: guard._registry.owners.checkouts.open_checkouts())
        server.released.set()
        waiting.join(DEADLINE)


def wait_until(holds):
    end = threading.Event()
    for _ in range(int(DEADLINE / 0.02)):
        if holds():
            return True
        end.wait(0.02)
    return False


def test_a_pool_that_opens_more_connections_is_never_full(server, guard):
    with urllib3.PoolManager(maxsize=1) as manager:
        kept = [manager.request("GET", server.url, preload_content=False) for _ in range(3)]
        report = guard.scan()
        assert report.full_pools == ()
        assert {each.observation.checkout.max_size for each in report.findings} == {None}
        assert {each.observation.checkout.out for each in report.findings} == {3}
        for each in kept:
            each.drain_conn()


def test_a_full_pool_says_which_lines_have_its_connections(server, monkeypatch):
    monkeypatch.setattr("closewait_guard._judge.alerts._MAX_FULL", 0.0)
    limits = httpx.Limits(max_connections=2)
    with httpx.Client(limits=limits) as client, cwg.Guard() as guard:
        kept = [
            client.send(client.build_request("GET", server.url + "/half"), stream=True)
            for _ in range(2)
        ]
        with pytest.raises(httpx.PoolTimeout):
            client.get(server.url, timeout=httpx.Timeout(5.0, pool=0.01))
        [raised] = guard.report().alerts
        assert (raised.kind, raised.code) == (AlertKind.POOL_EXHAUSTED, "CWG807")
        assert "2 of 2 connections of httpcore pool of an httpx client" in raised.message
        assert f"2 at {__file__}:" in raised.message
        for each in kept:
            each.close()
        assert guard.report().full_pools == ()


def test_a_response_that_was_collected_keeps_its_place_in_the_pool(server, guard):
    def ask():
        client.send(client.build_request("GET", server.url + "/half"), stream=True)

    with httpx.Client() as client:
        ask()
        gc.collect()
        [found] = checked_out(guard.scan())
        assert found.observation.record.site.function.rpartition(".")[2] == "ask"
        assert found.hint.startswith("give it back: ")
    assert checked_out(guard.scan()) == []


def test_a_response_that_is_read_on_is_in_use(server, monkeypatch):
    from closewait_guard._inspect import owners

    with requests.Session() as session, cwg.Guard(cwg.Settings(checkout_grace=3600)) as guard:
        response = session.get(server.url + "/half", stream=True)
        then = owners.wall() + 4000
        monkeypatch.setattr(owners, "wall", lambda: then)
        assert response.raw.read(500)
        if sys.platform == "linux":
            assert checked_out(guard.scan()) == []
        let_the_kernel_say_that_nothing_comes(monkeypatch)
        [found] = checked_out(guard.scan())
        assert found.verdict is Verdict.CHECKED_OUT
        response.close()


def let_the_kernel_say_that_nothing_comes(monkeypatch):
    from closewait_guard._inspect import owners

    make = owners.make_observation

    def make_old(*args):
        return owners.replace(make(*args), last_sent_for=7200.0, last_received_for=7200.0)

    monkeypatch.setattr(owners, "make_observation", make_old)


def test_a_block_must_not_leave_a_response_unread_on_an_older_connection(server, guard):
    with requests.Session() as session:
        session.get(server.url)
        # Of the server, ends may be open.
        with guard.no_leaks(allow_open=True):
            session.get(server.url, stream=True).close()
        kept = []
        with (
            pytest.raises(cwg.SocketLeakError) as caught,
            guard.no_leaks(grace=0, allow_open=True),
        ):
            kept.append(session.get(server.url + "/half", stream=True))
        [found] = caught.value.report.findings
        assert found.verdict is Verdict.CHECKED_OUT
        kept[0].close()


METHODS = {
    urllib3.HTTPConnectionPool: ("_get_conn", "_put_conn"),
    httpcore.ConnectionPool: ("handle_request",),
    httpcore.AsyncConnectionPool: ("handle_async_request",),
    httpcore._sync.connection_pool.PoolByteStream: ("close",),
    httpcore._async.connection_pool.PoolByteStream: ("aclose",),
}


def methods_of_pools():
    return [vars(cls)[name] for cls, names in METHODS.items() for name in names]


def test_uninstalling_leaves_the_methods_of_http_pools_as_they_were():
    before = methods_of_pools()
    with cwg.Guard():
        during = methods_of_pools()
        kinds = [inspect.iscoroutinefunction(each) for each in during]
    assert methods_of_pools() == before
    assert not set(before) & set(during)
    assert kinds == [inspect.iscoroutinefunction(each) for each in before]


async def app(scope, receive, send):
    """Answers at once, and goes on with the body when asked at another path."""
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x", "more_body": scope["path"] == "/half"})
    if scope["path"] == "/half":
        await receive()
        await receive()


@asynccontextmanager
async def http2_server():
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config, port, stop = Config(), free_port(), asyncio.Event()
    config.bind = [f"127.0.0.1:{port}"]
    serving = asyncio.create_task(serve(app, config, shutdown_trigger=stop.wait))
    try:
        await asyncio.to_thread(get, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop.set()
        await serving


def test_a_connection_that_serves_many_requests_is_never_full(guard):
    async def main():
        limits = httpx.Limits(max_connections=1)
        async with (
            http2_server() as url,
            httpx.AsyncClient(http1=False, http2=True, limits=limits) as client,
        ):
            kept = [
                await client.send(client.build_request("GET", url + "/half"), stream=True)
                for _ in range(2)
            ]
            assert [each.http_version for each in kept] == ["HTTP/2"] * 2
            report = guard.scan()
            for each in kept:
                await each.aclose()
            assert not taken_in(guard)
        return report

    report = asyncio.run(main())
    assert report.full_pools == ()
    found = [each for each in report.findings if each.verdict is Verdict.CHECKED_OUT]
    assert {each.observation.checkout.out for each in found} == {2}
