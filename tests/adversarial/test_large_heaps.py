"""Where the heap is too large to be asked whole, the search goes forward in small steps."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import subprocess
import sys
import threading
import time
import types
import weakref
from collections import deque

import pytest

import closewait_guard as cwg
from closewait_guard._clock import Allowance
from closewait_guard._holders import explain, libraries
from closewait_guard._live import gc_objects
from closewait_guard._live.frames import shows_other_threads
from conftest import run_apart

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
made = weakref.WeakSet()

# A build of Python may lay frames out in a way that is not known.
needs_variables_of_other_threads = pytest.mark.skipif(
    not shows_other_threads(), reason="this Python cannot show them safely"
)


def leak():
    ours, theirs = socket.socketpair()
    theirs.close()
    made.add(ours)
    return ours


@pytest.fixture
def module():
    module = sys.modules["app.prices"] = types.ModuleType("app.prices")
    module.__file__ = "/srv/app/prices.py"
    yield module
    for sock in list(made):
        sock.close()
    del sys.modules["app.prices"]


@pytest.fixture
def guard(monkeypatch):
    """Of a process whose heap counts as large: no question to all of it may be asked."""
    with cwg.Guard(cwg.Settings(grace=0)) as guard, monkeypatch.context() as patched:
        for user in (explain, libraries):
            patched.setattr(user, "is_too_large", lambda: True)
        patched.setattr(gc_objects.gc, "get_referrers", forbidden)
        yield guard


def forbidden(*_):
    raise AssertionError("this asks the whole heap")


def holders(guard):
    time.sleep(0.02)
    # On a busy machine the time for a search may not suffice; then it is made again.
    for _ in range(10):
        report = guard.scan()
        assert len(report.findings) == 1, cwg.render_text(report)
        [found] = report.findings
        assert not any("failed" in note for note in report.coverage.notes)
        if found.holders:
            break
    return found.holders[0]


class Connection:
    def __init__(self, sock):
        self.sock = sock


def test_globals_attributes_keys_and_indexes_are_reported(guard, module):
    module.cache = {"EUR": [None, Connection(leak())]}
    assert holders(guard) == "app.prices.cache['EUR'][1].sock (module global)"
    module.cache["EUR"][1].sock.close()
    module.cache = functools.partial(print, deque([leak()]))
    assert holders(guard) == "app.prices.cache.args[0][0] (module global)"


def test_what_lies_behind_a_container_of_many_is_reported():
    # In a process of its own: in that of a whole run there is much else to go through first.
    run_apart(
        """
import socket, sys, time, types
import closewait_guard as cwg
from closewait_guard._holders import explain, libraries

explain._MAX_SECONDS = 10.0
explain.is_too_large = libraries.is_too_large = lambda: True
module = sys.modules["app.prices"] = types.ModuleType("app.prices")
module.__file__ = "/srv/app/prices.py"

class Connection:
    def __init__(self, sock):
        self.sock = sock

with cwg.Guard(cwg.Settings(grace=0)) as guard:
    module.rows = [{"id": number, "row": [number]} for number in range(20_000)]
    module.table = {number: [number] for number in range(20_000)}
    module.rows.append(module.table)
    module.ours, theirs = socket.socketpair()
    theirs.close()
    module.table["last"] = Connection(module.__dict__.pop("ours"))
    time.sleep(0.02)
    [leak] = guard.scan().findings
    assert leak.holders[0] == "app.prices.table['last'].sock (module global)", leak.holders
    module.table["last"].sock.close()
"""
    )


@needs_variables_of_other_threads
def test_the_variable_of_a_call_in_another_thread_is_reported(guard):
    ended = threading.Event()

    def works():
        mine = Connection(leak())
        ended.wait(10)
        return mine

    thread = threading.Thread(target=works, name="worker-3")
    thread.start()
    time.sleep(0.1)
    holder = holders(guard)
    ended.set()
    thread.join()
    assert holder.startswith(
        "local 'mine' of test_the_variable_of_a_call_in_another_thread_is_reported."
    )
    assert "works() in thread worker-3, now at" in holder
    assert holder.endswith("mine.sock")


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="the coroutines of another thread are not asked"
)
def test_a_suspended_task_and_a_class_are_reported(guard, module):
    async def refreshes():
        conn = Connection(leak())
        await asyncio.sleep(60)
        return conn

    async def main():
        task = asyncio.create_task(refreshes(), name="refresh-7")
        await asyncio.sleep(0.01)
        holder = await asyncio.to_thread(holders, guard)
        task.cancel()
        return holder

    holder = asyncio.run(main())
    assert holder.startswith("task 'refresh-7' suspended at")
    for sock in list(made):
        sock.close()
    module.Service = type("Service", (), {"conn": Connection(leak()), "__module__": "app.prices"})
    assert holders(guard) == "app.prices.Service.conn.sock (class attribute)"


def test_an_idle_connection_of_a_pool_is_explained(guard, module):
    urllib3 = pytest.importorskip("urllib3")
    module.pool = urllib3.HTTPConnectionPool("127.0.0.1", 1)
    connection = urllib3.connection.HTTPConnection("127.0.0.1", 1)
    connection.sock = leak()
    module.pool.pool.get_nowait()
    module.pool.pool.put(connection)
    time.sleep(0.02)
    [found] = guard.scan().findings
    assert found.verdict is cwg.Verdict.STALE_POOL
    assert "urllib3 pool of http://127.0.0.1:1: idle in the pool" in found.holders[-1]


def test_a_series_that_may_not_search_yet_says_so_and_searches_later(guard, module, monkeypatch):
    monkeypatch.setattr(Allowance, "balance", lambda *_, **__: 0.0)
    module.kept = leak()
    time.sleep(0.02)
    report = guard.report()
    [found] = report.findings
    assert found.holders == ()
    assert any(note.startswith("what holds 1 socket (searching") for note in report.coverage.notes)
    monkeypatch.setattr(Allowance, "balance", lambda *_, **__: 0.4)
    report = guard.report()
    assert report.findings[0].holders == ("app.prices.kept (module global)",)
    assert not any(note.startswith("what holds") for note in report.coverage.notes)


def test_a_machine_that_was_busy_is_not_slow_for_ever(monkeypatch):
    cost = gc_objects._Cost
    monkeypatch.setattr(gc_objects, "_MAX_STOP", 0.02)
    for name in ("per_block", "blocks", "counted_until"):
        monkeypatch.setattr(cost, name, getattr(cost, name))
    assert not gc_objects.is_too_large()
    cost.per_block = 1.25 * 0.02 / cost.blocks
    assert gc_objects.is_too_large()
    for elapsed, is_too_large in ((10, True), (60, False)):
        cost.counted_until = time.monotonic() - elapsed
        assert gc_objects.is_too_large() is is_too_large
    # What it measures at first it may not fall below: a large heap stays one.
    cost.counted_until -= 10_000
    assert not gc_objects.is_too_large()
    assert cost.per_block == gc_objects._PER_BLOCK


def test_a_small_heap_is_asked_whole_and_in_a_series_too(module):
    with cwg.Guard(cwg.Settings(grace=0)) as guard:
        module.kept = leak()
        time.sleep(0.02)
        assert guard.report().findings[0].holders == ("app.prices.kept (module global)",)


@pytest.mark.long
@pytest.mark.parametrize("interval", ["0.1", "1.0"])
def test_no_thread_stands_still_for_long_among_five_million_objects(interval, attack_seconds):
    command = [sys.executable, "-m", "benchmarks.stops", "5000000"]
    done = subprocess.run(
        [*command, str(int(attack_seconds)), interval],
        check=True,
        capture_output=True,
        text=True,
        timeout=120 + 2 * attack_seconds,
    )
    longest_stop, share, _ = json.loads(done.stdout)
    assert longest_stop <= 0.02
    assert share <= 0.0125
