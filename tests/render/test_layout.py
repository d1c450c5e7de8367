"""How a real report is laid out at several widths: aligned, whole identifiers, in one order."""

from __future__ import annotations

import re
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

import closewait_guard as cwg
from closewait_guard._format import Layout, wrap_text
from closewait_guard._render import native_note, render_report
from closewait_guard.testing import half_closed_pair

KEYS = ["opened", "fix", "held by", "state", "process", "context"]
WIDTHS = pytest.mark.parametrize("width", [60, 80, 120])


@pytest.fixture(scope="module")
def report():
    """What a guard finds of sockets that were leaked in several ways."""
    with ExitStack() as stack, cwg.Guard(cwg.Settings(grace=0)) as guard:
        for _ in range(3):
            stack.enter_context(half_closed_pair(b"unread " * 3))
        with cwg.label("a label"):
            lingering, theirs = socket.socketpair()
        stack.callback(lingering.makefile("rb").close)
        kept = lingering.makefile("rb")
        stack.callback(kept.close)
        lingering.close()
        theirs.close()

        def open_and_drop():
            socket.socket()

        with pytest.warns(ResourceWarning):
            worker = threading.Thread(target=open_and_drop, name="dropping-worker")
            worker.start()
            worker.join()
        time.sleep(0.05)
        return guard.scan()


def blocks_of(text):
    return [block.splitlines() for block in text.split("\n\n") if re.match(r"\[\d+\] ", block)]


@WIDTHS
def test_each_line_fits_unless_it_is_one_identifier(report, width):
    text = cwg.render_text(report, width=width)
    assert len(blocks_of(text)) == 3
    for line in text.splitlines():
        assert len(line) <= width or len(line.split()) <= 3, line


@WIDTHS
def test_keys_are_aligned_and_in_one_order(report, width):
    for first, *facts in blocks_of(cwg.render_text(report, width=width)):
        assert re.match(r"\[\d\] \d [A-Z]+  (TCP|UNIX)", first)
        assert all(line.startswith("    ") for line in facts if "CWG" not in line)
        keys = [line[4:13].rstrip() for line in facts if line[4:5].strip()]
        assert keys == [key for key in KEYS if key in keys]
        assert len(keys) >= 2
        assert all(line[12] == " " for line in facts if len(line) > 12 and "CWG" not in line)


@WIDTHS
def test_identifiers_paths_and_code_are_not_folded(report, width):
    holder = "app.kept_by_a_name_of_some_length['the key of number 0'].sock (module global)"
    held = tuple(replace(each, holders=(holder,)) for each in report.findings)
    text = cwg.render_text(replace(report, findings=held), width=width)
    assert holder.partition(" (")[0] in text
    assert re.search(r"test_layout\.py:\d+ in report\(\)$", text, re.MULTILINE)
    assert re.search(r" in report\.<locals>\.open_and_drop\(\)$", text, re.MULTILINE)
    assert "`with`" in text


@WIDTHS
def test_verdict_and_code_are_in_the_first_line_and_what_is_critical_last(report, width):
    text = cwg.render_text(report, width=width)
    for finding in report.findings:
        assert finding.code.startswith("CWG")
        verdict = finding.verdict.value.upper()
        severity = "  critical" if finding.severity is cwg.Severity.CRITICAL else ""
        title = rf"^\[\d\] \d {verdict}  [^[]*?{finding.code}{severity}$"
        assert re.search(title, text, re.MULTILINE), text


def test_code_in_backticks_is_folded_only_where_it_is_longer_than_a_line():
    code = "`with session.get(url, stream=True) as response:`"
    text = f"Close the response that is not read to its end: {code}"
    assert wrap_text(text, "    ", 60)[-1].strip() == code
    assert len(wrap_text(text, "    ", 30)) > 3


def test_what_begins_a_line_is_kept_with_a_word_that_has_no_room():
    [line] = wrap_text("x" * 90, " " * 13, 80, "    held by  ")
    assert line == "    held by  " + "x" * 90


def test_paths_below_the_directory_are_relative_to_it_and_no_others():
    layout = Layout(directory="/srv/shop")
    assert layout.relative("at /srv/shop/app.py:3") == "at app.py:3"
    for text in ("/srv/shopping/app.py:3", "/mnt/srv/shop/app.py:3", "x/srv/shop/app.py"):
        assert layout.relative(text) == text
    assert Layout(directory="/").relative("/app.py:3") == "/app.py:3"


def test_a_report_shows_paths_relative_to_the_working_directory(report, monkeypatch):
    here = Path(__file__)
    monkeypatch.chdir(here.parent)
    assert f"opened   {here.name}:" in cwg.render_text(report)
    monkeypatch.chdir("/")
    assert f"opened   {here}:" in cwg.render_text(report, width=200)


def test_the_main_thread_is_no_news(report):
    text = cwg.render_text(report)
    assert "context  thread MainThread" not in text
    assert "thread dropping-worker" in text
    assert "context  thread MainThread" in cwg.render_text(report, verbose=True)


def test_one_place_has_no_counts_beside_its_only_peer(report):
    leaked = [each for each in report.findings if each.verdict is cwg.Verdict.LEAKED]
    same = tuple(
        replace(each, observation=replace(each.observation, peer="10.0.0.1:80")) for each in leaked
    )
    text = cwg.render_text(replace(report, findings=same))
    assert "TCP to 10.0.0.1:80 " in text
    assert "10.0.0.1:80 (" not in text


@pytest.mark.parametrize("used", [1, 199])
def test_a_share_of_the_descriptors_below_a_percent_is_shown_only_with_all_details(report, used):
    report = replace(report, fd_used=used, fd_limit=20_000, descriptors=None)
    assert "descriptors" not in render_report(report)
    assert f"File descriptors: {used} of 20,000." in render_report(report, Layout(verbose=True))
    assert "File descriptors: 200 of 20,000 (1%)." in render_report(replace(report, fd_used=200))
    assert f"File descriptors: {used}." in render_report(replace(report, fd_limit=None))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_line_that_there_is_no_leak_is_folded_between_its_parts(report, width):
    idle = replace(report.findings[0], verdict=cwg.Verdict.STALE_POOL, severity=cwg.Severity.INFO)
    quiet = replace(report, findings=(idle,), fd_used=15, fd_limit=20_000)
    lines = render_report(quiet, Layout(width)).splitlines()
    assert all(len(line) <= width for line in lines)
    counts = [line for line in lines if "(" in line or ")" in line]
    assert len(counts) == 1 or (width == 60 and counts[0].endswith(","))


def test_what_is_zero_is_not_shown(report):
    coverage = replace(report.coverage, notes=(), adopted=0, native=0, earlier=0)
    assert native_note(coverage) == ""
    assert native_note(replace(coverage, native=2, attributed=2)) == ""
    coverage = replace(coverage, notes=(native_note(coverage),))
    text = cwg.render_text(replace(report, coverage=coverage))
    assert "Not covered" not in text
    assert "0 unread" not in text


def test_an_alert_that_is_over_is_shown_as_resolved(report):
    raised = cwg.Alert(cwg.AlertKind.FD_LIMIT, cwg.Severity.WARNING, "too many", {})
    over = replace(raised, status=cwg.AlertStatus.RESOLVED, message="few again")
    text = render_report(replace(report, alerts=(raised, over)))
    assert "\nFD LIMIT  too many  (warning)\n" in text
    assert "\nRESOLVED  fd limit: few again\n" in text
