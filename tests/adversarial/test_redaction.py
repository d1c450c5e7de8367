"""`redact` is applied to all that is reported; if it misbehaves, only texts are lost."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
import structlog

import closewait_guard as cwg
from closewait_guard._processes import ProcessScanner, render_processes
from closewait_guard._redact import WITHHELD, Redaction
from closewait_guard.testing import half_closed_pair
from leaking import fork, leaking_guard


def hidden(text):
    return "hidden"


def test_a_redact_callable_that_blocks_withholds_all_and_is_waited_for_once():
    free = threading.Event()

    def blocks(text):
        free.wait(20)
        return "hidden"

    with leaking_guard() as guard:
        report = guard.scan()
    redaction = Redaction(blocks, timeout=0.2)
    try:
        first = redaction.report(report)
        started = time.monotonic()
        assert redaction.text("secret") == WITHHELD
        assert time.monotonic() - started < 0.15
    finally:
        free.set()
    assert first.host == first.findings[0].observation.peer == WITHHELD
    assert "texts that the redact callable failed on" in cwg.render_text(first).replace("\n  ", " ")
    deadline = time.monotonic() + 10
    while redaction.text("secret") == WITHHELD and time.monotonic() < deadline:
        time.sleep(0.01)
    assert redaction.text("secret") == "hidden"


def test_a_redact_callable_that_calls_report_withholds_that_one():
    inner = []

    def asks(text):
        if not inner:
            inner.append(None)
            inner.append(guard.scan())
        return "hidden"

    with leaking_guard(redact=asks) as guard:
        outer = guard.scan()
    assert inner[1].host == WITHHELD
    assert outer.host == "hidden"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_the_callable_blocks_has_a_turn_of_its_own():
    free, parent = threading.Event(), os.getpid()

    def blocks(text):
        if os.getpid() == parent:
            free.wait(20)
        return "hidden"

    redaction = Redaction(blocks, timeout=0.1)
    try:
        assert redaction.text("secret") == WITHHELD
        child = fork()
        if child == 0:
            os._exit(0 if redaction.text("secret") == "hidden" else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        free.set()
        redaction._thread._thread.join(10)


def test_alerts_and_notes_of_a_series_pass_through_redact():
    with leaking_guard(redact=hidden, count_warning=0) as guard:
        report = guard._next_in_series(["a note of the monitor"])
    assert report.alerts
    assert {alert.message for alert in report.alerts} == {"hidden"}
    assert set(report.coverage.notes) == {"hidden"}
    assert report.alerts[0].data["count"] == 1


def test_sockets_that_closed_late_pass_through_redact():
    with leaking_guard(redact=hidden, count=0) as guard:
        with half_closed_pair():
            time.sleep(0.03)
            assert guard.report().leaks
        [closed] = guard.report().closed_late
    assert closed.finding.observation.peer == closed.finding.observation.record.thread == "hidden"


def test_no_value_of_the_context_is_lost_where_its_names_read_alike():
    settings = {"context": lambda: {"card": 4711, "name": "x", "vip": True}}
    with leaking_guard(redact=hidden, **settings) as guard:
        [leak] = guard.scan().findings
    context = leak.observation.record.context
    assert list(context.values()) == ["hidden", "hidden", True]
    assert list(context) == ["hidden", "hidden (2)", "hidden (3)"]


def test_what_a_failing_reporter_raises_is_logged_redacted_and_without_variables():
    def broken(report):
        local = "s3cr3t of a variable"
        raise ValueError(f"s3cr3t{len(local)}\x1b[31m")

    with structlog.testing.capture_logs() as logs:
        with leaking_guard(broken, redact=lambda text: text.replace("s3cr3t", "***")) as guard:
            guard.report()
    [log] = logs
    assert "s3cr3t" not in str(log)
    assert log["error"] == r"ValueError: ***20\x1b[31m"
    assert "exc_info" not in log


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_addresses_of_a_backlog_and_of_unowned_sockets_pass_through_redact():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()):
            pass
        time.sleep(0.03)
        found = ProcessScanner(cwg.Settings(redact=hidden)).scan([os.getpid()])
        port = str(server.getsockname()[1])
    [process] = found.processes
    assert process.backlog | process.uncertain_backlog == {"hidden": 1}
    assert f":{port}" not in render_processes(found, only=found.processes)
    assert all(seen.peer == "hidden" for those in found.unowned.values() for seen in those)
