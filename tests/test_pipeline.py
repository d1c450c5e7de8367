"""One scan judges once, raises thresholds once and finds hints once; settling makes no report."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager

import pytest

import closewait_guard as cwg
from closewait_guard import _pipeline
from closewait_guard._clock import TimeLimit
from closewait_guard._holders import explain, threads
from closewait_guard._judge import alerts, verdict
from closewait_guard._libraries import PoolUse
from closewait_guard.testing import half_closed_pair


@pytest.fixture
def calls(monkeypatch):
    """How often each stage was called, and for which socket."""
    counts = Counter()

    def count(module, name, subject=lambda *_: None):
        function = getattr(module, name)

        def counted(*arguments, **options):
            counts[name, subject(*arguments)] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(verdict, "verdict_of", lambda seen, _: seen.record.serial)
    count(explain, "hint_for")
    count(alerts, "_count_alert")
    count(_pipeline.Pipeline, "_report")
    count(_pipeline.Pipeline, "_coverage")
    count(explain.Explainer, "explain")
    return counts


def keep_idle_in_pool(monkeypatch, guard, serial):
    """Have a pool say that it keeps this socket for later."""
    use = PoolUse("urllib3", "HTTPConnectionPool", is_idle=True, max_size=1)
    monkeypatch.setattr(guard._pipeline._pools, "uses", lambda *_, **__: {serial: use})


@pytest.mark.parametrize("function", ["scan", "report"])
def test_one_scan_judges_each_socket_once_even_if_it_is_idle_in_a_pool(
    calls, monkeypatch, function
):
    with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair(), half_closed_pair():
        serial = guard.scan().leaks[0].observation.record.serial
        keep_idle_in_pool(monkeypatch, guard, serial)
        calls.clear()
        report = getattr(guard, function)()
    assert {finding.verdict for finding in report.findings} == {"leaked", "stale_pool"}
    assert all(finding.hint for finding in report.findings)
    judged = {subject: n for (name, subject), n in calls.items() if name == "verdict_of"}
    assert set(judged.values()) == {1}
    # Of the other, nothing has changed since the scan before.
    assert calls["hint_for", None] == 1
    assert calls["_count_alert", None] == 1


def python_calls(function):
    """How many calls of Python a call makes."""
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(frame) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(calls)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the calls of the probe of Linux")
def test_a_leak_that_has_not_changed_since_the_scan_before_costs_at_most_fifty_calls():
    with cwg.Guard(cwg.Settings(grace=0)) as guard, ExitStack() as stack:
        counts = []
        for _ in range(2):
            for _ in range(20):
                stack.enter_context(half_closed_pair())
            for _ in range(5):
                guard.scan()
            # Where the clock makes an age more exact, there is a little more to do.
            counts.append(min(python_calls(guard.scan) for _ in range(5)))
    assert counts[1] - counts[0] < 50 * 20


FIRST_REPORT = """
import sys
import closewait_guard as cwg
from closewait_guard.testing import half_closed_pair

calls = []
with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair():
    sys.setprofile(lambda frame, event, _: calls.append(frame) if event == "call" else None)
    report = guard.report()
    cwg.render_text(report)
    sys.setprofile(None)
    assert report.leaks[0].holders
print(len(calls))
"""


def test_the_first_report_of_one_leak_takes_no_call_for_each_module_that_is_loaded():
    loaded = "import sys, types\nfor n in range(900): sys.modules[f'm{n}'] = types.ModuleType('m')"
    counts = []
    for before in ("", loaded):
        code = f"{before}\n{FIRST_REPORT}"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
        counts.append(int(done.stdout))
    assert counts[1] - counts[0] < 300, counts
    assert counts[0] < 8000, counts


def test_settling_makes_no_report_and_looks_for_no_holders(calls):
    with cwg.Guard() as guard, ExitStack() as stack, guard.no_leaks(grace=5):
        stack.enter_context(half_closed_pair())
        threading.Timer(0.1, stack.close).start()
    assert any(name == "verdict_of" for name, _ in calls)
    assert calls["_report", None] == calls["_coverage", None] == calls["explain", None] == 0
    assert calls["hint_for", None] == 0


def test_what_is_still_open_after_settling_is_reported_in_full(calls):
    with cwg.Guard() as guard, ExitStack() as stack:
        with pytest.raises(cwg.SocketLeakError) as caught, guard.no_leaks(grace=0.01):
            stack.enter_context(half_closed_pair())
        assert calls["_report", None] == calls["_coverage", None] == 1
    (leak,) = caught.value.report.leaks
    assert leak.holders
    assert leak.hint


CALLS = "what running calls do with connections: "


@contextmanager
def another_thread():
    may_end = threading.Event()
    thread = threading.Thread(target=may_end.wait, args=(20,))
    thread.start()
    try:
        yield
    finally:
        may_end.set()
        thread.join()


def notes_on_calls(guard):
    return [note for note in guard.scan().coverage.notes if note.startswith(CALLS)]


def test_a_look_at_running_calls_that_fails_is_said_of_that_scan_only(monkeypatch):
    def broken():
        raise ValueError("no frames at this moment")

    with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair():
        with monkeypatch.context() as patched:
            patched.setattr(threads, "_calls_of_others", broken)
            assert notes_on_calls(guard) == [f"{CALLS}looking at them has failed"]
        assert notes_on_calls(guard) == []


def test_running_calls_that_there_was_no_time_to_look_at_are_said(monkeypatch):
    with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair(), another_thread():
        with monkeypatch.context() as patched:
            patched.setattr(explain.Explainer, "time_to_search", lambda *_, **__: TimeLimit(0))
            assert notes_on_calls(guard) == [f"{CALLS}not all of them, for lack of time"]
        assert notes_on_calls(guard) == []


def call_deeply(depth, last):
    if depth:
        call_deeply(depth - 1, last)
    else:
        last()


@contextmanager
def deep_threads(count, depth):
    may_end, are_deep = threading.Event(), threading.Barrier(count + 1, timeout=20)

    def wait():
        are_deep.wait()
        may_end.wait(20)

    every = [threading.Thread(target=call_deeply, args=(depth, wait)) for _ in range(count)]
    for each in every:
        each.start()
    try:
        are_deep.wait()
        yield
    finally:
        may_end.set()
        for each in every:
            each.join()


def test_more_running_calls_than_are_looked_at_are_not_put_down_to_time(monkeypatch):
    enough = TimeLimit(60)
    monkeypatch.setattr(explain.Explainer, "time_to_search", lambda *_, **__: enough)
    with cwg.Guard(cwg.Settings(grace=0)) as guard, half_closed_pair():
        with deep_threads(8, depth=700):
            (note,) = notes_on_calls(guard)
            assert note == f"{CALLS}not all of them, there are more than 5,000"
        assert notes_on_calls(guard) == []
