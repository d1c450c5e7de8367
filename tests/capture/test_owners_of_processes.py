"""Child processes and their pools that are not closed are found: pipes, and who made them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import multiprocessing
import multiprocessing.pool
import subprocess
import sys
import threading
import time

import pytest
from test_owners import owners_in, quietly

import closewait_guard as cwg
from closewait_guard import Verdict
from closewait_guard._render import descriptor_kinds

FORK = multiprocessing.get_context("fork")
# Two more processes than `surplus` allows, in a program with one thread.
MANY = 7

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def guard():
    gc.collect()
    with cwg.Guard(cwg.Settings(grace=0.05)) as installed:
        yield installed


def wait_for_end(processes):
    deadline = time.monotonic() + 60
    while not all(has_ended(each) for each in processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_ended(process):
    """Whether a child has, without waiting for it."""
    import os

    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reap():
    """Wait for the children that subprocess has taken over, and close their pipes."""
    deadline = time.monotonic() + 60
    while subprocess._active:
        assert time.monotonic() < deadline
        subprocess._cleanup()
        time.sleep(0.01)


def echo():
    return subprocess.Popen(["echo", "x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_process_that_is_collected_with_open_pipes_is_found_with_its_line(guard):
    with quietly():
        for _ in range(3):
            echo().stdout.read()
        reap()
    found = owners_in(guard.scan())
    assert [(each.verdict, each.code) for each in found] == [(Verdict.UNCLOSED, "CWG901")] * 3
    owner = found[0].observation.owner
    assert (owner.name, owner.sockets, owner.descriptors) == ("subprocess.Popen", 0, {"pipe": 2})
    assert found[0].observation.record.site.function == "echo"
    assert "communicate()" in found[0].hint
    assert "3 UNCLOSED  subprocess.Popen with 2 pipes each" in str(guard.scan())


def test_processes_of_one_line_that_have_ended_and_keep_their_pipes_are_found(guard):
    kept = [echo() for _ in range(MANY)]
    wait_for_end(kept)
    found = owners_in(guard.scan())
    assert [(each.verdict, each.code) for each in found] == [(Verdict.UNCLOSED, "CWG902")] * MANY
    assert all(each.returncode is None for each in kept), "nothing is waited for by a scan"
    for each in kept:
        each.communicate()
    assert guard.scan().findings == ()


def test_processes_that_nothing_has_waited_for_are_found_without_a_pipe_too(guard):
    kept = [subprocess.Popen(["true"]) for _ in range(MANY)]
    wait_for_end(kept)
    assert [each.verdict for each in owners_in(guard.scan())] == [Verdict.UNCLOSED] * MANY
    for each in kept:
        each.wait()
    assert guard.scan().findings == ()


def run_and_wait():
    subprocess.run(["echo", "x"], capture_output=True, check=True)
    with echo():
        pass
    echo().communicate()
    subprocess.Popen(["true"]).wait()


def leave_running():
    """Without a pipe nothing of it is left here."""
    subprocess.Popen(["sleep", "0.5"])


def use_pools():
    with FORK.Pool(1) as pool:
        pool.map(len, ["x"])
    pool = FORK.Pool(1)
    pool.close()
    pool.join()
    with multiprocessing.pool.ThreadPool(1) as threads:
        threads.map(len, ["x"])


def use_executors():
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=FORK) as executor:
        executor.submit(len, "x").result()
    threads = set(threading.enumerate())
    # Its own thread ends it as soon as it is collected.
    concurrent.futures.ProcessPoolExecutor(1, mp_context=FORK).submit(len, "x").result()
    gc.collect()
    for thread in set(threading.enumerate()) - threads:
        thread.join(60)


def use_asyncio():
    async def run():
        process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
        await process.communicate(b"x")
        process = await asyncio.create_subprocess_exec("true")
        await process.wait()

    asyncio.run(run())


@pytest.mark.parametrize(
    "function",
    [run_and_wait, leave_running, use_pools, use_executors, use_asyncio],
    ids=lambda function: function.__name__,
)
def test_what_ends_in_a_proper_way_is_not(guard, function):
    with quietly():
        for _ in range(3):
            function()
        assert guard.scan().findings == ()
        reap()


def test_processes_at_work_are_not(guard):
    kept = [subprocess.Popen(["cat"], stdin=subprocess.PIPE) for _ in range(MANY)]
    assert guard.scan().findings == ()
    for each in kept:
        each.communicate()


LEFT = """
import asyncio, sys
import closewait_guard as cwg

async def leave():
    return await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)

guard = cwg.install(grace=0.05)
process = asyncio.run(leave())
for found in guard.scan().findings:
    record = found.observation.record
    print(found.code, found.observation.owner.name, record.site.function, found.hint)
process.kill()
"""


def test_a_subprocess_whose_event_loop_has_ended_is_found_once():
    command = [sys.executable, "-W", "ignore", "-c", LEFT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("CWG902 asyncio subprocess leave `await process.communicate()`")


LEFT_BY_BLOCK = """
import asyncio
import closewait_guard as cwg

async def leave():
    return await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)

try:
    with cwg.no_leaks(grace=0.05):
        process = asyncio.run(leave())
except cwg.SocketLeakError as error:
    for found in error.report.findings:
        print(found.code, found.observation.owner.name, found.observation.record.site.function)
process.kill()
"""


def test_a_block_does_not_pass_with_a_subprocess_whose_event_loop_has_ended():
    command = [sys.executable, "-W", "ignore", "-c", LEFT_BY_BLOCK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["CWG902 asyncio subprocess leave"]


def make_pool():
    pool = FORK.Pool(1)
    pool.map(len, ["x"])
    return pool


def make_threads():
    pool = multiprocessing.pool.ThreadPool(1)
    pool.map(len, ["x"])
    return pool


def make_executor():
    executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=FORK)
    executor.submit(len, "x").result()
    return executor


@pytest.mark.parametrize("make", [make_pool, make_threads])
def test_a_pool_that_is_collected_is_found(guard, make):
    with quietly():
        make()
    (found,) = owners_in(guard.scan())
    assert (found.verdict, found.code) == (Verdict.UNCLOSED, "CWG901")
    assert found.observation.owner.name.startswith("multiprocessing.pool.")
    assert found.observation.owner.descriptors["pipe"] >= 2
    assert found.observation.record.site.function == make.__name__
    assert "pool.close()" in found.hint


@pytest.mark.parametrize(
    ("make", "end"),
    [(make_pool, "terminate"), (make_executor, "shutdown")],
    ids=["pool", "executor"],
)
def test_a_pool_for_each_call_that_is_kept_is_more_than_is_needed(guard, make, end):
    """Their own threads do not count as some that may need one."""
    kept = [make() for _ in range(MANY)]
    found = owners_in(guard.scan())
    assert [(each.verdict, each.code) for each in found] == [(Verdict.SURPLUS, "CWG903")] * MANY
    assert found[0].observation.record.site.function == make.__name__
    for each in kept:
        getattr(each, end)()
    assert guard.scan().findings == ()


def test_where_no_line_is_recorded_none_has_made_too_many():
    with cwg.Guard(cwg.Settings(grace=0.05, stack_depth=0)) as guard:
        kept = [echo() for _ in range(MANY)]
        wait_for_end(kept)
        assert guard.scan().findings == ()
        for each in kept:
            each.communicate()


def make_loop():
    return asyncio.new_event_loop()


@pytest.mark.skipif(sys.platform != "linux", reason="epoll is Linux's")
def test_a_report_of_all_descriptors_names_what_has_pipes_and_epolls(guard):
    # By their line, whatever has called it.
    loops = [make_loop() for _ in range(2)]
    loops.append(make_loop())
    kept = [echo() for _ in range(2)]
    report = guard.scan(full=True)
    places = {
        function: f"{__file__}:{function.__code__.co_firstlineno + 1}"
        for function in (make_loop, echo)
    }
    assert report.descriptors.owners == {
        "epoll": {f"3 asyncio event loops opened at {places[make_loop]}": 3},
        "pipe": {f"2 subprocess.Popen opened at {places[echo]}": 4},
    }
    assert "3 epoll (3 asyncio event loops opened at" in descriptor_kinds(report)
    assert "pipes (2 subprocess.Popen opened at" in descriptor_kinds(report)
    for loop in loops:
        loop.close()
    for process in kept:
        process.communicate()
    assert guard.scan(full=True).descriptors.owners == {}
    assert guard.scan().descriptors.owners == {}
