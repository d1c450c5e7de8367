"""Sessions, clients and event loops that are not closed are found, with the line that made them."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import operator
import re
import socket
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import jsonschema
import pytest

import closewait_guard as cwg
from closewait_guard import Evidence, Verdict
from closewait_guard._capture import patch
from command_line import call as call_command
from schema import SCHEMA
from servers import redis_server, web, web_elsewhere

aiohttp = pytest.importorskip("aiohttp")
httpx = pytest.importorskip("httpx")
httpx2 = pytest.importorskip("httpx2")


@pytest.fixture
def url():
    with web_elsewhere() as address:
        yield address


@pytest.fixture
def guard():
    gc.collect()
    with cwg.Guard(cwg.Settings(grace=0.05)) as installed:
        yield installed


@contextmanager
def quietly():
    """Without what the libraries say themselves."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            gc.collect()
            logging.disable(logging.NOTSET)


def owners_in(report):
    return [finding for finding in report.findings if finding.observation.owner is not None]


async def get_by_session(url):
    session = aiohttp.ClientSession()
    async with session.get(url) as response:
        await response.read()


def get_by_client(url):
    httpx.Client().get(url)


async def get_by_async_client(url):
    await httpx.AsyncClient().get(url)


def get_by_next_client(url):
    httpx2.Client().get(url)


async def get_by_next_async_client(url):
    await httpx2.AsyncClient().get(url)


UNCLOSED = {
    "aiohttp.ClientSession": get_by_session,
    "httpx.Client": get_by_client,
    "httpx.AsyncClient": get_by_async_client,
    "httpx2.Client": get_by_next_client,
    "httpx2.AsyncClient": get_by_next_async_client,
}


def call(function, *arguments):
    result = function(*arguments)
    return asyncio.run(result) if inspect.isawaitable(result) else result


@pytest.mark.parametrize("name", UNCLOSED)
def test_what_is_collected_without_its_close_is_found_with_its_line(guard, url, name):
    with quietly():
        for _ in range(3):
            call(UNCLOSED[name], url)
    report = guard.scan()
    found = owners_in(report)
    assert [finding.verdict for finding in found] == [Verdict.UNCLOSED] * 3
    assert report.leaks == tuple(found), "the sockets of an owner are not reported beside it"
    owner, record = found[0].observation.owner, found[0].observation.record
    assert (owner.name, owner.sockets) == (name, 1)
    assert owner.peers == (url.removeprefix("http://"),)
    assert record.site.function == UNCLOSED[name].__name__
    assert f"{name.rpartition('.')[2]}()" in record.site.source
    assert found[0].code == "CWG901"
    assert "reuse one" in found[0].hint


async def close_session(url):
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        await response.read()
    session = aiohttp.ClientSession()
    async with session.get(url) as response:
        await response.read()
    await session.close()


async def lend_a_connector(url):
    async with aiohttp.TCPConnector() as connector:
        session = aiohttp.ClientSession(connector=connector, connector_owner=False)
        async with session.get(url) as response:
            await response.read()
        session.detach()


def close_client(url):
    with httpx.Client() as client:
        client.get(url)
    client = httpx.Client()
    client.get(url)
    client.close()
    httpx.get(url)


def close_next_client(url):
    with httpx2.Client() as client:
        client.get(url)
    httpx2.get(url)


async def close_async_client(url):
    async with httpx.AsyncClient() as client:
        await client.get(url)
    client = httpx.AsyncClient()
    await client.get(url)
    await client.aclose()


def use_sessions_of_requests(url):
    requests = pytest.importorskip("requests")
    requests.get(url, timeout=9)
    # Its pools close their connections when they are collected, as the library means them to.
    requests.Session().get(url)


def never_connect(_):
    httpx.Client()


CLOSED = [
    close_session,
    lend_a_connector,
    close_client,
    close_next_client,
    close_async_client,
    use_sessions_of_requests,
    never_connect,
]


@pytest.mark.parametrize("function", CLOSED, ids=lambda function: function.__name__)
def test_what_is_closed_in_a_proper_way_or_never_connected_is_not(guard, url, function):
    with quietly():
        for _ in range(3):
            call(function, url)
    assert guard.scan().findings == ()


def test_a_session_whose_event_loop_has_ended_is_found_while_it_is_kept(guard, url):
    kept = []

    async def keep():
        kept.append(aiohttp.ClientSession())
        async with kept[0].get(url) as response:
            await response.read()

    asyncio.run(keep())
    (found,) = owners_in(guard.scan())
    assert (found.verdict, found.code) == (Verdict.UNCLOSED, "CWG902")
    assert found.observation.evidence is Evidence.OWNER
    assert any("kept[0]" in holder for holder in found.holders), found.holders
    with quietly():
        kept.clear()


class Shop:
    """Keeps its session in a reference cycle, as the asynchronous client of Elasticsearch does."""

    def __init__(self):
        self.shop, self.connector = self, aiohttp.TCPConnector()
        self.session = aiohttp.ClientSession(connector=self.connector)


def test_a_session_is_found_whose_connector_is_finalized_before_it_and_closes_itself(guard, url):
    async def drop():
        async with Shop().session.get(url) as response:
            await response.read()

    async def main():
        gc.disable()
        try:
            for _ in range(3):
                await drop()
        finally:
            gc.enable()
        gc.collect()
        await asyncio.sleep(0.1)
        return guard.scan()

    with quietly():
        report = asyncio.run(main())
    found = owners_in(report)
    assert report.leaks == tuple(found)
    assert [finding.verdict for finding in found] == [Verdict.UNCLOSED] * 3
    assert {finding.observation.owner.name for finding in found} == {"aiohttp.ClientSession"}
    assert found[0].observation.owner.peers == (url.removeprefix("http://"),)
    assert "ClientSession(" in found[0].observation.record.site.source


async def share_a_connector(url, *, owned):
    connector = aiohttp.TCPConnector()
    session = aiohttp.ClientSession(connector=connector, connector_owner=owned)
    async with session.get(url) as response:
        await response.read()
    if not owned:
        await session.close()


@pytest.mark.parametrize(
    ("owned", "name"), [(False, "aiohttp connector"), (True, "aiohttp.ClientSession")]
)
def test_a_connector_is_its_sessions_or_found_by_itself_if_no_session_closes_it(
    guard, url, owned, name
):
    async def main():
        await share_a_connector(url, owned=owned)
        await asyncio.sleep(0.1)

    with quietly():
        asyncio.run(main())
    [found] = guard.scan().leaks
    assert (found.verdict, found.observation.owner.name) == (Verdict.UNCLOSED, name)
    assert f"{name.rpartition('.')[2]} with 1 socket" in cwg.render_text(guard.scan())
    assert ("connector.close()" in found.hint) is not owned


def test_a_session_that_is_used_and_kept_is_not(guard, url):
    async def use():
        session = aiohttp.ClientSession()
        async with session.get(url) as response:
            await response.read()
        report = await asyncio.to_thread(guard.scan)
        await session.close()
        return report

    assert asyncio.run(use()).findings == ()


def test_a_redis_client_that_is_collected_is_found(guard):
    redis = pytest.importorskip("redis.asyncio")

    async def ask(port):
        client = redis.Redis(port=port)
        await client.ping()

    async def ask_and_close(port):
        client = redis.Redis(port=port)
        await client.ping()
        await client.aclose()

    with redis_server() as port, quietly():
        asyncio.run(ask_and_close(port))
        assert guard.scan().findings == ()
        asyncio.run(ask(port))
    (found,) = owners_in(guard.scan())
    assert found.observation.owner.name == "redis.asyncio.Redis"
    assert found.observation.record.site.source == "client = redis.Redis(port=port)"


# Event loops.


def run_loop():
    loop = asyncio.new_event_loop()
    loop.run_until_complete(asyncio.sleep(0))
    return loop


def test_event_loops_of_one_line_that_are_stopped_and_kept_are_found(guard):
    loops = [run_loop() for _ in range(20)]
    found = owners_in(guard.scan())
    assert {finding.verdict for finding in found} == {Verdict.UNCLOSED}
    assert len(found) == 20
    assert found[0].observation.owner.name == "asyncio event loop"
    assert found[0].observation.record.site.function == "run_loop"
    assert "loop.close()" in found[0].hint
    assert found[0].holders == (), "the loop does not hold itself"
    for loop in loops:
        loop.close()
    assert guard.scan().findings == ()


def test_a_loop_for_each_thread_and_one_that_is_kept_for_later_are_not(guard):
    loops, done = [], threading.Event()

    def serve():
        loops.append(run_loop())
        done.wait(60)

    threads = [threading.Thread(target=serve) for _ in range(10)]
    for thread in threads:
        thread.start()
    try:
        while len(loops) < len(threads):
            done.wait(0.01)
        assert guard.scan().findings == ()
    finally:
        done.set()
        for thread in threads:
            thread.join()
        for loop in loops:
            loop.close()


def test_an_event_loop_that_is_collected_is_found_with_its_line(guard):
    # A collection while the loop is made lets the next one finalize its sockets before it, and the
    # interpreter's own close of the loop raise.
    gc.collect()
    with quietly():
        run_loop()
    (found,) = owners_in(guard.scan())
    assert (found.verdict, found.code) == (Verdict.UNCLOSED, "CWG901")
    assert found.observation.record.site.function == "run_loop"


# More than the program needs.


def test_clients_for_each_call_that_are_kept_are_more_than_are_needed(guard, url):
    kept = []

    def get():
        kept.append(httpx.Client())
        return kept[-1].get(url)

    for _ in range(20):
        get()
    found = owners_in(guard.scan())
    assert [finding.verdict for finding in found] == [Verdict.SURPLUS] * 20
    assert (found[0].code, found[0].is_leak) == ("CWG903", True)
    assert found[0].observation.record.site.source == "kept.append(httpx.Client())"
    (group,) = guard.scan().by_site()
    assert group.count == 20
    for client in kept:
        client.close()
    assert guard.scan().findings == ()


def test_a_client_for_each_thread_task_and_address_is_not(guard):
    def get(address):
        client = httpx.Client()
        client.get(address)
        return client

    with web() as first, web() as second:
        kept = [get(server.url) for server in (first, second) for _ in range(4)]
        assert guard.scan().findings == ()
        for client in kept:
            client.close()


def test_clients_of_tasks_that_are_under_way_are_not(guard, url):
    async def handle(ready, end):
        async with httpx.AsyncClient() as client:
            await client.get(url)
            ready.append(client)
            await end.wait()

    async def serve():
        ready, end = [], asyncio.Event()
        tasks = [asyncio.create_task(handle(ready, end)) for _ in range(12)]
        while len(ready) < len(tasks):
            await asyncio.sleep(0.01)
        report = await asyncio.to_thread(guard.scan)
        end.set()
        await asyncio.gather(*tasks)
        return report

    assert asyncio.run(serve()).findings == ()


# A program, a block, and data.


def test_a_block_fails_for_a_session_that_is_collected_in_it(url):
    with pytest.raises(cwg.SocketLeakError, match=r"UNCLOSED +aiohttp\.ClientSession") as raised:
        with cwg.no_leaks(grace=0.05), quietly():
            call(get_by_session, url)
    assert len(raised.value.report.leaks) == 1
    with cwg.no_leaks(grace=0.05), quietly():
        call(close_session, url)


def test_a_socket_of_a_kept_client_has_the_line_that_made_that(url):
    with pytest.raises(cwg.SocketLeakError) as raised, cwg.no_leaks(grace=0.05):
        client = httpx.Client()
        client.get(url)
    client.close()
    (found,) = raised.value.report.findings
    assert found.observation.record.site.source == "client.get(url)"
    (sentence,) = [each for each in found.holders if "was made at" in each]
    assert sentence.startswith(f"its httpx.Client was made at {__file__}:")
    assert sentence.endswith(" in test_a_socket_of_a_kept_client_has_the_line_that_made_that()")


def test_a_report_with_owners_survives_json_and_fits_the_schema(guard, url):
    with quietly():
        call(get_by_session, url)
    report = guard.scan()
    data = cwg.to_dict(report)
    jsonschema.validate(data, SCHEMA)
    assert cwg.from_dict(data) == report
    assert data["findings"][0]["observation"]["owner"]["name"] == "aiohttp.ClientSession"
    assert "1 unclosed object from 1 place" in cwg.render_text(report)


# The classes.

CLASSES = [aiohttp.ClientSession, httpx.Client, httpx.AsyncClient, asyncio.BaseEventLoop]


def test_the_classes_are_left_as_they_were_found():
    before = [dict(vars(cls)) for cls in CLASSES]
    signatures = [inspect.signature(cls) for cls in CLASSES]
    with cwg.Guard():
        assert patch.is_patched()
        assert [inspect.signature(cls) for cls in CLASSES] == signatures
        now = [vars(cls)["__init__"] for cls in CLASSES]
        assert not any(map(operator.is_, now, [was["__init__"] for was in before]))
    assert [dict(vars(cls)) for cls in CLASSES] == before


def test_what_a_constructor_raises_comes_out_and_nothing_is_recorded(guard):
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        httpx.Client(nonsense=1)
    assert guard.scan().coverage.failures == 0
    assert guard.scan().findings == ()


def test_a_subclass_with_a_finalizer_of_its_own_is_left_to_that(guard, url):
    class Careful(httpx.Client):
        def __del__(self):
            self.close()

    Careful().get(url)
    gc.collect()
    assert guard.scan().findings == ()


def test_an_owner_is_not_kept_alive_and_has_no_attribute_more(guard):
    client = httpx.Client()
    names, reference = set(vars(client)), __import__("weakref").ref(client)
    del client
    assert reference() is None
    assert names == set(vars(httpx.Client()))


LATE = """
import closewait_guard as cwg
guard = cwg.install()
import sys
assert "httpx" not in sys.modules and "asyncio" not in sys.modules
assert "closewait_guard._capture.owners" not in sys.modules
import httpx
from closewait_guard._capture import patch
assert "closewait_guard._capture.owners" in sys.modules
print(hasattr(vars(httpx.Client)["__del__"], "__code__"))
cwg.uninstall()
print("__del__" in vars(httpx.Client), patch.is_patched())
"""


def test_a_library_that_is_imported_later_is_patched_then_and_none_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", LATE], capture_output=True, text=True, timeout=60, check=True
    )
    # What finalizes is in C, with the extension and without.
    assert done.stdout == "False\nFalse False\n"


# Classes of the program.


class Session:
    def __init__(self, sock=None):
        self.sock = sock

    def close(self):
        if self.sock is not None:
            self.sock.close()


class AsyncSession(Session):
    async def aclose(self):
        self.close()


def test_a_class_of_the_program_is_tracked_until_the_guard_is_uninstalled():
    before = dict(vars(Session))
    with cwg.Guard(cwg.Settings(grace=60)) as guard:
        guard.track(Session)
        ours, theirs = socket.socketpair()
        session = Session(ours)
        del ours
        with quietly():
            del session
        (found,) = guard.scan().leaks
        assert found.observation.owner.name == f"{__name__}.Session"
        assert found.observation.owner.sockets == 1
        assert found.observation.record.site.source == "session = Session(ours)"
        assert "in a `finally` block" in found.hint
        Session().close()
        Session()
        text = cwg.render_text(guard.scan())
        assert "1 UNCLOSED  test_owners.Session with 1 socket" in text
        assert "1 UNCLOSED  test_owners.Session  " in text
        theirs.close()
    assert dict(vars(Session)) == before


def test_the_close_of_a_class_may_have_any_name(guard):
    guard.track(AsyncSession, close=["aclose"])
    asyncio.run(AsyncSession().aclose())
    assert guard.scan().findings == ()
    AsyncSession().close()
    (found,) = guard.scan().findings
    assert found.verdict is Verdict.UNCLOSED
    assert "close()" not in found.hint


class Rigid:
    __slots__ = ()

    def close(self):
        pass


@pytest.mark.parametrize(
    ("cls", "close", "message"),
    [
        ("Session", "close", "expected a class, got 'Session'"),
        (Session, "shut", "has no method 'shut': give close=..."),
        (Session, ["close", "shut"], "has no method 'shut'"),
        (set, "clear", "builtins.set is written in C and cannot be changed"),
        (Rigid, "close", "add '__weakref__' to its __slots__"),
    ],
)
def test_what_cannot_be_tracked_is_refused_in_one_sentence(guard, cls, close, message):
    with pytest.raises(cwg.ConfigurationError, match=re.escape(message)):
        guard.track(cls, close=close)


def test_tracking_needs_an_installed_guard():
    with pytest.raises(cwg.ConfigurationError, match=r"call install\(\) first"):
        cwg.track(Session)


class Scanning:
    """Its finalizer has the guard look, as that of an event loop does under `run`."""

    def __init__(self, scan):
        self.scan, self.itself = scan, self
        self.ours, self.theirs = socket.socketpair()

    def close(self):
        pass

    def __del__(self):
        self.scan()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_scan_in_the_middle_of_a_collection_forgets_nothing_that_is_collected(guard):
    guard.track(Scanning)
    for _ in range(3):
        Scanning(guard.scan)
    gc.collect()
    found = guard.scan().findings
    assert [each.observation.owner.name.rpartition(".")[2] for each in found] == ["Scanning"] * 3


FORGETTING = """
import asyncio, sys
import aiohttp

async def ask():
    session = aiohttp.ClientSession()
    async with session.get(sys.argv[1]) as response:
        await response.read()

asyncio.run(ask())
"""


def test_a_gate_does_not_pass_where_no_record_of_what_was_not_closed_is_kept(tmp_path, url):
    """aiohttp has closed the socket of the session: nothing else is left of it."""
    (tmp_path / "program.py").write_text(FORGETTING)
    done = call_command(
        *("run", "--fail-on-leak", tmp_path / "program.py", url), CLOSEWAIT_GUARD_DROPPED_KEPT="0"
    )
    assert done.returncode == 87, done.stderr
    said = " ".join(done.stderr.split())
    assert "where 1 unclosed object was made: no record is left" in said
