"""What only the end of a program closes is in its last report, and is no finding."""

from __future__ import annotations

import gc
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

import closewait_guard as cwg
from closewait_guard._inspect import records
from closewait_guard._render import LastReport, Part, render_page, sum_reports
from command_line import COMMAND, call, documents, environment
from findings import reports_in
from servers import redis_server, web_elsewhere

httpx = pytest.importorskip("httpx")

CLOSED = "closed only by the end of the program"

HTTPX = """
import sys, httpx
kept = []

def fetch():
    kept.append(httpx.Client())
    kept[-1].get(sys.argv[1])

for _ in range(int(sys.argv[2])):
    fetch()
"""
AIOHTTP = """
import asyncio, sys, aiohttp

async def fetch():
    session = aiohttp.ClientSession()
    async with session.get(sys.argv[1]) as response:
        await response.read()
    return session

loop = asyncio.new_event_loop()
session = loop.run_until_complete(fetch())
"""
REDIS = """
import sys, redis
pool = redis.ConnectionPool(port=int(sys.argv[1]))
client = redis.Redis(connection_pool=pool)
client.ping()
own = redis.Redis(port=int(sys.argv[1]))
own.ping()
"""
WATCHED = "import closewait_guard as cwg\nmonitor = cwg.watch(reporters=['text'], at_exit=True)\n"


@pytest.fixture(scope="module")
def url():
    with web_elsewhere() as address:
        yield address


def last_report(tmp_path, source, *arguments, how="run"):
    """As text, of a program that succeeds; its lines in one."""
    path = tmp_path / "shop.py"
    path.write_text(WATCHED + source if how == "watch" else source)
    command = COMMAND if how == "run" else [sys.executable]
    options = ["run", "--fail-on-leak"] if how == "run" else []
    done = call(*options, path.name, *arguments, cwd=tmp_path, command=command, code=0)
    assert len(reports_in(done.stderr)) == 1, done.stderr
    # Before it, aiohttp says that its session was not closed.
    report = done.stderr[done.stderr.index(reports_in(done.stderr)[0]) :]
    assert report.startswith("closewait-guard: no leaks ("), done.stderr
    return re.sub(r"\s+", " ", report)


def line_of(source, text, how):
    lines = (WATCHED + source if how == "watch" else source).split("\n")
    return next(number for number, line in enumerate(lines, 1) if text in line)


@pytest.mark.parametrize("how", ["run", "watch"])
@pytest.mark.parametrize(("count", "verdict"), [(1, "not a leak"), (3, "not leaks")])
def test_clients_of_httpx_that_are_kept(tmp_path, url, how, count, verdict):
    report = last_report(tmp_path, HTTPX, url, count, how=how)
    line = line_of(HTTPX, "httpx.Client()", how)
    opened = f"{count} httpx.Client opened at shop.py:{line} in fetch()"
    assert report.endswith(f" shop.py Open at the end: {opened}, {CLOSED} ({verdict}). "), report


@pytest.mark.parametrize("how", ["run", "watch"])
def test_a_session_of_aiohttp_whose_loop_is_open_and_the_loop(tmp_path, url, how):
    pytest.importorskip("aiohttp")
    report = last_report(tmp_path, AIOHTTP, url, how=how)
    session, loop = (line_of(AIOHTTP, text, how) for text in ("ClientSession()", "new_event_loop"))
    assert f"Open at the end, {CLOSED} (not leaks): " in report, report
    assert f" 1 aiohttp.ClientSession opened at shop.py:{session} in fetch() " in report, report
    assert f" 1 asyncio event loop opened at shop.py:{loop} in <module> " in report, report


@pytest.mark.parametrize("how", ["run", "watch"])
def test_a_pool_of_redis_that_was_given_to_a_client_and_no_client_with_its_own(tmp_path, how):
    pytest.importorskip("redis")
    with redis_server() as port:
        report = last_report(tmp_path, REDIS, port, how=how)
    line = line_of(REDIS, "redis.ConnectionPool(", how)
    opened = f"1 redis.ConnectionPool opened at shop.py:{line} in <module>"
    assert report.endswith(f" Open at the end: {opened}, {CLOSED} (not a leak). "), report


THREADS = """
import socket, sys, threading
from concurrent.futures import ThreadPoolExecutor
import httpx
local = threading.local()

def fetch(_):
    if not hasattr(local, "client"):
        local.client = httpx.Client()
        local.socket = socket.socket(type=socket.SOCK_DGRAM)
        ready.wait(10)
    return local.client.get(sys.argv[1])

ready = threading.Barrier(3)
executor = ThreadPoolExecutor(3)
list(executor.map(fetch, range(9)))
"""


@pytest.mark.parametrize("how", ["run", "watch"])
def test_clients_that_the_threads_of_an_executor_keep_for_themselves(tmp_path, url, how):
    report = last_report(tmp_path, THREADS, url, how=how)
    line = line_of(THREADS, "httpx.Client()", how)
    opened = f"3 httpx.Client opened at shop.py:{line} in fetch()"
    assert report.endswith(f" shop.py Open at the end: {opened}, {CLOSED} (not leaks). "), report


def test_clients_of_threads_that_exit_functions_end(tmp_path, url):
    pool = "from multiprocessing.pool import ThreadPool as ThreadPoolExecutor"
    code = THREADS.replace("from concurrent.futures import ThreadPoolExecutor", pool)
    report = last_report(tmp_path, code, url)
    assert "no leaks" in report
    assert " 3 httpx.Client opened at shop.py:" in report


ENDS_LATE = """
def fetch():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    local.client = httpx.Client()
    local.client.get(sys.argv[1])

def serve():
    thread.join()
    time.sleep(0.3)

local = threading.local()
thread = threading.Thread(target=fetch, daemon=False)
thread.start()
threading.Thread(target=serve).start()
"""
LEAKING = {
    "a function that runs on after the end of the main thread": """
def fetch():
    ready.wait(10)
    client = httpx.Client()
    client.get(sys.argv[1])

ready = threading.Event()
threading.Thread(target=fetch).start()
threading.Timer(0.3, ready.set).start()
""",
    "a thread that ends by itself after the main thread": ENDS_LATE,
    "a thread that nobody waits for, and that ends while others run": ENDS_LATE.replace(
        "daemon=False", "daemon=True"
    ),
    "a thread that ends before": """
def fetch():
    local.client = httpx.Client()
    local.client.get(sys.argv[1])

local = threading.local()
thread = threading.Thread(target=fetch)
thread.start()
thread.join()
""",
}


@pytest.mark.parametrize("name", LEAKING)
def test_a_client_that_ends_with_a_function_or_with_its_thread_is_unclosed(tmp_path, url, name):
    path = tmp_path / "shop.py"
    path.write_text("import sys, threading, time\nimport httpx\n" + LEAKING[name])
    done = call("run", "--fail-on-leak", path.name, url, cwd=tmp_path, code=86)
    assert "1 UNCLOSED  httpx.Client" in done.stderr
    assert CLOSED not in done.stderr


COLLECTED = """
import gc
import closewait_guard as cwg

def redact(text):
    gc.collect()
    return text

gc.disable()
monitor = cwg.watch(reporters=["text"], at_exit=True, redact=redact)
import asyncio
asyncio.new_event_loop()
"""


def test_what_is_collected_while_the_last_report_is_made_is_listed_too(tmp_path):
    path = tmp_path / "shop.py"
    path.write_text(COLLECTED)
    done = call(path.name, cwd=tmp_path, command=[sys.executable])
    line = line_of(COLLECTED, "new_event_loop()", "run")
    report = re.sub(r"\s+", " ", done.stderr)
    assert f"1 asyncio event loop opened at shop.py:{line} in <module>, {CLOSED}" in report


SILENT = {
    "nothing": "",
    "sockets": "import socket\nkept = socket.create_server(('127.0.0.1', 0))\n",
    "closed": HTTPX + "for each in kept:\n    each.close()\n",
    "never connected": "import httpx\nclient = httpx.Client()\n",
    "requests": "import sys, requests\nsession = requests.Session()\nsession.get(sys.argv[1])\n",
    "loop that runs": """
import asyncio, threading
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
""",
}


@pytest.mark.parametrize("how", ["run", "watch"])
@pytest.mark.parametrize("name", SILENT)
def test_a_healthy_program_prints_the_one_line_that_it_printed_before(tmp_path, url, name, how):
    report = last_report(tmp_path, SILENT[name], url, 2, how=how)
    summary = r"closewait-guard: no leaks \(\d sockets?, fds [\d,]+ of [\d,]+\)\s+pid \d+ shop.py "
    assert re.fullmatch(summary, report), report


def test_a_block_with_a_monitor_is_not_the_end_of_the_program(tmp_path, url):
    source = f"""
import closewait_guard as cwg
with cwg.watch(reporters=["text"], at_exit=True):
{HTTPX.replace(chr(10), chr(10) + "    ")}
    assert cwg.scan().open_at_end == ()
for each in kept:
    each.close()
"""
    path = tmp_path / "shop.py"
    path.write_text(source)
    done = call(path, url, 2, command=[sys.executable], code=0)
    assert "closewait-guard: no leaks (2 sockets" in done.stderr, done.stderr
    assert "Open at the end" not in done.stderr, done.stderr


def test_a_program_that_is_terminated(tmp_path, url):
    (tmp_path / "shop.py").write_text(HTTPX + "print(1, flush=True)\nsys.stdin.read()\n")
    with subprocess.Popen(
        [*COMMAND, "run", "shop.py", url, "1"],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout.readline() == "1\n"
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=60)
    assert "Open at the end: 1 httpx.Client opened at shop.py:6 in fetch()" in errors, errors


def test_json_and_what_is_saved_have_it_in_the_last_report_only(tmp_path, url):
    (tmp_path / "shop.py").write_text(HTTPX + "import time\ntime.sleep(1.5)\n")
    saved = tmp_path / "saved.jsonl"
    options = ["--interval", "0.5", "--report", f"json_lines:{saved}"]
    call("run", *options, "shop.py", url, 2, cwd=tmp_path, code=0)
    *earlier, last = documents(saved.read_text())
    assert earlier
    assert not any(report.open_at_end for report in earlier)
    place = f"{tmp_path / 'shop.py'}:6 in fetch()"
    assert last.open_at_end == (cwg.OpenAtEnd("httpx.Client", 2, place),)
    assert (last.findings, last.alerts) == ((), ())
    shown = call("show", saved, cwd=tmp_path, code=0).stdout
    assert "Open at the end: 2 httpx.Client opened at shop.py:6 in fetch()" in shown
    old = cwg.to_dict(last)
    del old["open_at_end"]
    assert cwg.from_dict(old) == replace(last, open_at_end=())


def test_its_places_are_redacted(tmp_path, url):
    (tmp_path / "masks.py").write_text("def mask(text):\n    return text.replace('shop', 'XXX')\n")
    (tmp_path / "shop.py").write_text(HTTPX)
    options = ["--redact", "masks:mask"]
    done = call("run", *options, "shop.py", url, 1, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "Open at the end: 1 httpx.Client opened at XXX.py:6 in fetch()" in done.stderr
    assert "shop" not in done.stderr, done.stderr


def test_workers_have_one_line_together(tmp_path, url):
    source = HTTPX.replace("for _ in", "import os\nif not os.fork():\n    os.fork()\nfor _ in")
    (tmp_path / "shop.py").write_text(source)
    done = call("run", "shop.py", url, 2, cwd=tmp_path, code=0)
    text = re.sub(r"\s+", " ", done.stderr)
    assert "Open at the end: 6 httpx.Client opened at shop.py:6 in fetch(), in 3 processes" in text


# In this process.


@pytest.fixture
def guard():
    gc.collect()
    with cwg.Guard(cwg.Settings(grace=0.05)) as installed:
        yield installed


def fetch(url, count):
    clients = []
    for _ in range(count):
        clients.append(httpx.Client())
        clients[-1].get(url)
    return clients


def last(guard):
    return guard._pipeline.with_open_at_end(guard.scan())


def test_what_a_finding_of_the_report_names_is_not_listed_again(guard, url):
    clients = fetch(url, 12)
    report = last(guard)
    assert len(report.leaks) == 12, cwg.render_text(report)
    assert report.open_at_end == ()
    for each in clients[2:]:
        each.close()
    [found] = last(guard).open_at_end
    assert found.count == 2
    assert found.place.startswith(f"{__file__}:")
    for each in clients[:2]:
        each.close()
    assert last(guard).open_at_end == ()


def test_it_keeps_nothing_alive(guard, url):
    clients = fetch(url, 2)
    report = last(guard)
    assert [each.count for each in report.open_at_end] == [2]
    before = [each for each in gc.get_referrers(clients[0]) if each is not clients]
    assert before == []
    for each in clients:
        each.close()


def test_without_time_left_or_after_a_failure_the_report_says_so(guard, url, monkeypatch):
    clients = fetch(url, 1)
    monkeypatch.setattr(records, "_MAX_SECONDS", -10.0)
    report = last(guard)
    assert report.open_at_end == ()
    missing = "what only the end of the program closes"
    assert f"some of {missing}: there are too many objects" in report.coverage.notes
    monkeypatch.setattr(records, "TimeLimit", None)
    assert f"{missing}: the search failed (TypeError)" in last(guard).coverage.notes
    clients[0].close()


def test_lines_beyond_a_few_are_added_up(guard):
    lines = tuple(cwg.OpenAtEnd("shop.Client", 9 - n, f"shop.py:{n} in f()") for n in range(6))
    report = replace(guard.scan(), open_at_end=(*lines, cwg.OpenAtEnd("other object", 5, "")))
    text = cwg.render_text(report)
    assert text.count("shop.Client opened at shop.py:") == 3, text
    assert text.endswith("  20 others\n") or "\n  20 others\n" in text, text
    for shown in ("  9 shop.Client opened at shop.py:0 in f()", "Open at the end, "):
        assert shown in text, text
    page = render_page([Part([LastReport(report)])])
    assert "9 shop.Client opened at shop.py:0 in f()</p>" in page, page[-3000:]


def test_processes_are_added_up(guard):
    report = guard.scan()
    one, two = (
        replace(report, pid=pid, open_sockets=1, open_at_end=(cwg.OpenAtEnd("x.Client", pid, "y"),))
        for pid in (1, 2)
    )
    assert sum_reports([one, two]).open_at_end == (cwg.OpenAtEnd("x.Client", 3, "y", 2),)
