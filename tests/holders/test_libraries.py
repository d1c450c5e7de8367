"""What is known of a library stands in one value, and all that reads it reads that value."""

from __future__ import annotations

import asyncio
import gc
import http.client
import os
import pkgutil
import socket
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

import closewait_guard as cwg
from closewait_guard import _libraries
from closewait_guard._holders.libraries import hints_of_libraries
from closewait_guard._libraries import (
    HandleKind,
    HolderHint,
    Library,
    NativeCode,
    PoolKind,
    kinds,
)
from closewait_guard._live import elements_of, field, number_of
from closewait_guard.commands import doctor
from closewait_guard.testing import connected_pair
from findings import findings_of
from servers import web


class Pool:
    def __init__(self):
        self.waiting = []
        self.in_use = []


class Wrapper:
    def __init__(self, connection):
        self._connection = connection


class Link:
    """Has a descriptor, as the objects of native libraries have, and no socket object."""

    def __init__(self, fd):
        self.fd = fd

    def close(self):
        os.close(self.fd)


def connect():
    """A link, and the other end of its connection."""
    sender, receiver = socket.socketpair()
    with sender, receiver, connected_pair() as (ours, theirs):
        socket.send_fds(sender, [b"x"], [ours.fileno()])
        [fd] = socket.recv_fds(receiver, 1, 1)[1]
        return Link(fd), theirs.dup()


EXAMPLE = Library(
    "example",
    pools=(
        PoolKind(
            ("example.pools:Pool",),
            name=lambda _: "pool of example",
            max_size=lambda _: 3,
            idle=lambda pool: elements_of(field(pool, "waiting")),
            checked_out=lambda pool: elements_of(field(pool, "in_use")),
        ),
    ),
    handles=(HandleKind(("example.links:Link",), lambda link: (number_of(field(link, "fd")),)),),
    attributed=("example.links:connect",),
    hints=(
        HolderHint("example.links.Link", "call link.close()"),
        HolderHint("example", "give it back to the pool"),
        HolderHint("example", "the pool replaces it", (cwg.Verdict.STALE_POOL,)),
    ),
    native=(NativeCode("example", "example", "/example/", "keeps everything"),),
)


@pytest.fixture
def example(monkeypatch):
    """A foreign library that is known by one value."""
    package = types.ModuleType("example")
    package.pools, package.links = (
        types.ModuleType("example.pools"),
        types.ModuleType("example.links"),
    )
    package.pools.Pool = type("Pool", (Pool,), {"__module__": "example.pools"})
    package.links.Link = type("Link", (Link,), {"__module__": "example.links"})

    def connect_link():
        link, theirs = connect()
        return package.links.Link(link.fd), theirs

    package.links.connect = connect_link
    for module in (package, package.pools, package.links):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_libraries, "LIBRARIES", (EXAMPLE, *_libraries.LIBRARIES))
    return package


@pytest.fixture
def guard(example):
    with cwg.Guard(cwg.Settings(grace=0.05)) as guard:
        yield guard


def test_a_new_library_has_its_pools_asked_and_its_hints_given(guard, example):
    pool = example.pools.Pool()
    with connected_pair() as (idle, its_peer), connected_pair() as (used, peer_of_used):
        pool.waiting.append(idle)
        pool.in_use.append(used)
        its_peer.close()
        peer_of_used.close()
        [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
        assert stale.holders[-1] == "pool of example: idle in the pool (at most 3)"
        assert stale.hint == "the pool replaces it"
        [leak] = findings_of(guard, cwg.Verdict.LEAKED)
        assert leak.holders[-1] == "pool of example: checked out of the pool (at most 3)"
        assert leak.hint == "give it back to the pool"


def test_a_new_library_has_its_native_sockets_attributed_and_held(guard, example):
    guard.attribute("example")

    def open_link():
        return example.links.connect()

    mine, theirs = open_link()
    theirs.close()
    [leak] = findings_of(guard, cwg.Verdict.LEAKED)
    assert leak.observation.record.origin is cwg.Origin.NATIVE
    assert leak.observation.record.site.function.endswith("open_link")
    assert any("'mine' of" in holder for holder in leak.holders)
    assert leak.hint == "call link.close()"
    mine.close()


def test_a_new_library_has_its_links_found_in_pools_too(guard, example):
    pool = example.pools.Pool()
    link, theirs = example.links.connect()
    pool.waiting.append(Wrapper(link))
    theirs.close()
    [stale] = findings_of(guard, cwg.Verdict.STALE_POOL)
    assert stale.observation.fd == link.fd
    link.close()


def test_a_new_library_is_named_by_the_doctor(example, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: example if name == "example" else None)
    assert [code.what for code, _ in doctor.installed()] == ["keeps everything"]


def test_every_file_of_the_folder_is_listed():
    listed = {id(library) for library in _libraries.LIBRARIES}
    for file in pkgutil.iter_modules(_libraries.__path__):
        if file.name not in ("all", "classes", "handles", "kinds", "packages"):
            module = getattr(_libraries.all, file.name, None)
            assert module is not None, f"import {file.name} in _libraries/all.py"
            own = {id(library) for library in module.LIBRARIES}
            assert own
            assert own <= listed, f"add {file.name}.LIBRARIES to LIBRARIES"


def test_the_file_that_contributing_shows_is_one():
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = text.partition("```python\n")[2].partition("```")[0]
    variables = {}
    exec(compile(example, "CONTRIBUTING.md", "exec"), variables)
    [library] = variables["LIBRARIES"]
    assert library.hints[0].fits(
        cwg.Verdict.LEAKED, cwg.Origin.CREATED, ("tornado.iostream.IOStream",)
    )


def test_each_library_is_one_value():
    names = Counter(library.name for library in _libraries.LIBRARIES)
    assert names.most_common(1)[0][1] == 1


def test_every_hint_of_a_library_can_be_reached():
    hint_of = hints_of_libraries()
    for library in _libraries.LIBRARIES:
        for hint in library.hints:
            origins = [hint.origin] if hint.origin else list(cwg.Origin)
            for verdict in hint.verdicts:
                sentences = [hint_of(verdict, origin, (hint.holder,)) for origin in origins]
                assert hint.sentence in sentences


def test_a_hint_is_for_types_of_its_package_and_for_no_other_of_a_similar_name():
    hint_of = hints_of_libraries()
    leaked, created = cwg.Verdict.LEAKED, cwg.Origin.CREATED
    assert "return the connection" in hint_of(leaked, created, ("redis.client.Redis",))
    assert hint_of(leaked, created, ("redisx.Client",)) == ""
    assert hint_of(cwg.Verdict.HALF_CLOSED, created, ("redis.client.Redis",)) == ""


@pytest.mark.parametrize(
    ("holders", "first"),
    [
        # What a program holds comes before what that holds in turn, and a traceback before all.
        (("http.client.HTTPResponse", "urllib3.response.HTTPResponse"), "release_conn"),
        (("urllib3.response.HTTPResponse", "requests.models.Response"), "session.get"),
        (
            ("asyncio.streams.StreamWriter", "aiohttp.client.ClientSession"),
            "reuse one ClientSession",
        ),
        (("psycopg.Connection", "sqlalchemy.engine.base.Connection"), "engine.connect()"),
        (("uvloop.Loop", "psycopg.Connection"), "psycopg.connect"),
        (("requests.models.Response", "traceback"), "do not keep the exception"),
    ],
)
def test_of_several_holders_the_outermost_has_the_hint(holders, first):
    assert first in hints_of_libraries()(cwg.Verdict.LEAKED, cwg.Origin.CREATED, holders)


def test_a_library_that_is_known_is_not_imported_for_it():
    names = sorted({library.name.partition(".")[0] for library in _libraries.LIBRARIES})
    program = f"""
import sys
before = set(sys.modules)
import closewait_guard
closewait_guard.install()
closewait_guard.scan(full=True)
foreign = set({names}) - set(sys.stdlib_module_names)
print(sorted(foreign & set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_no_class_of_a_library_is_named_elsewhere_in_the_package():
    folder = Path(_libraries.__file__).parent
    classes = {
        name
        for library in _libraries.LIBRARIES
        for kind in (*library.pools, *library.handles, *library.inner)
        for name in kind.classes
    }
    classes |= {kind.owner_class for library in _libraries.LIBRARIES for kind in library.owners}
    for file in folder.parent.rglob("*.py"):
        if folder not in file.parents:
            text = file.read_text(encoding="utf-8")
            assert not [name for name in classes if name in text], file


def test_a_library_is_a_value_that_cannot_be_changed():
    assert all(isinstance(library, kinds.Library) for library in _libraries.LIBRARIES)
    with pytest.raises(AttributeError):
        _libraries.LIBRARIES[0].name = "other"


def keep_in_a_cycle(*things):
    cycle = [things]
    cycle.append(cycle)


def from_http_client(url):
    connection = http.client.HTTPConnection(url.partition("//")[2].rpartition("/")[0])
    connection.request("GET", "/partial")
    keep_in_a_cycle(connection)


def from_asyncio(url):
    host, port = urlsplit(url).hostname, urlsplit(url).port

    async def main():
        keep_in_a_cycle(await asyncio.open_connection(host, port))

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("lose", "hint"),
    [
        (from_http_client, "call connection.close()"),
        (from_asyncio, "`writer.close()`, then `await writer.wait_closed()`"),
    ],
)
def test_the_hint_of_a_reference_cycle_is_what_closes_the_librarys_object(guard, lose, hint):
    with web() as server:
        lose(server.url + "/partial")
        gc.collect()
        dropped = findings_of(guard, cwg.Verdict.DROPPED)
        [found] = [leak for leak in dropped if leak.observation.record.origin == "created"]
        assert found.hint.endswith(" (garbage-collected while open, in a reference cycle)"), (
            found.hint
        )
        assert hint in found.hint
        server.hang_up()


@pytest.mark.filterwarnings("ignore")
def test_a_listener_that_a_library_has_dropped_has_no_hint_for_connections(guard):
    async def main():
        loop = asyncio.get_running_loop()
        keep_in_a_cycle(await asyncio.start_server(lambda *_: None, "127.0.0.1", 0), loop)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop._selector.close()
    del loop
    gc.collect()
    listeners = [
        leak
        for leak in findings_of(guard, cwg.Verdict.DROPPED)
        if leak.observation.state is cwg.State.LISTEN
    ]
    assert len(listeners) == 1
    assert "writer.close()" not in listeners[0].hint


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_kept", [True, False])
def test_the_hint_of_an_event_loop_that_was_never_closed_is_to_close_the_loop(is_kept):
    loops = [asyncio.new_event_loop()]
    with pytest.raises(cwg.SocketLeakError) as caught, cwg.no_leaks(grace=0):
        loops.append(asyncio.new_event_loop())
        if not is_kept:
            # What asks a loop for a callback is a cycle.
            loops[1].run_until_complete(asyncio.sleep(0))
            loops.pop()
    hints = {finding.hint for finding in caught.value.report.findings}
    while loops:
        loops.pop().close()
    [hint] = hints
    assert "loop.close()" in hint
    assert "writer" not in hint


def hold_client(shop, url):
    shop.kept = httpx.Client()
    shop.kept.get(url)


def hold_response_in_client(shop, url):
    client = httpx.Client()
    client.last = client.send(client.build_request("GET", url + "/partial"), stream=True)
    shop.kept = client


def hold_connection(shop, url):
    shop.kept = http.client.HTTPConnection(url.partition("//")[2])
    shop.kept.request("GET", "/")


@pytest.mark.parametrize(
    ("hold", "holder"),
    [
        (hold_client, "shop.kept (module global): httpx.Client"),
        (hold_response_in_client, "shop.kept.last (module global): httpx.Response"),
        (hold_connection, "shop.kept (module global): http.client.HTTPConnection"),
    ],
)
def test_what_holds_a_socket_ends_at_the_object_that_the_hint_says_to_close(
    monkeypatch, hold, holder
):
    shop = types.ModuleType("shop")
    monkeypatch.setitem(sys.modules, "shop", shop)
    with web() as server:
        with pytest.raises(cwg.SocketLeakError) as caught, cwg.no_leaks(grace=0):
            hold(shop, server.url)
        shop.kept.close()
        server.hang_up()
    ours = [
        each
        for each in caught.value.report.findings
        if each.observation.record.origin in ("created", "checked_out")
    ]
    assert [each.holders[0] for each in ours] == [holder]
