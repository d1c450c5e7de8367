"""The reporters `text` and `console`: plain text to a stream, and colour on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import struct
import sys
import threading
from contextlib import contextmanager

import pytest

import closewait_guard as cwg
from closewait_guard import reporters
from leaking import leaking_guard, report_leaks, run

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def terminal(columns=80):
    """A pseudo-terminal to write to, and its output."""
    import fcntl
    import termios

    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = []

    def read():
        try:
            while data := os.read(outside, 65536):
                shown.append(data)
        except OSError:
            pass  # Linux raises this after the last writer has closed.

    reader = threading.Thread(target=read)
    with os.fdopen(inside, "w", encoding="utf-8") as stream:
        reader.start()
        yield stream, lambda: b"".join(shown).decode().replace("\r\n", "\n")
    reader.join(10)
    os.close(outside)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_text_goes_to_the_stream_that_was_given():
    stream = io.StringIO()
    report = report_leaks(reporters.text(stream))
    assert stream.getvalue() == f"{cwg.render_text(report)}\n"
    assert f"(pid {os.getpid()} on " in stream.getvalue().partition("\n\n")[0]
    assert "1 LEAKED" in stream.getvalue()


def test_text_goes_to_the_current_stderr(monkeypatch):
    with leaking_guard(reporters.text()) as guard:
        for _ in range(2):
            stream = io.StringIO()
            monkeypatch.setattr(sys, "stderr", stream)
            guard.report()
            assert "1 LEAKED" in stream.getvalue()


def test_in_a_program_without_stderr_nothing_is_written_and_nothing_fails(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with leaking_guard("text", "console") as guard:
        guard.report()
        assert guard.failed_reports == 0


def test_a_stream_that_cannot_show_a_letter_shows_its_number(tmp_path):
    (tmp_path / "tüte.py").write_text("import socket\ndef make(): return socket.socket()\n")
    sys.path.insert(0, str(tmp_path))
    try:
        make = __import__("tüte").make
    finally:
        sys.path.remove(str(tmp_path))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with cwg.Guard(cwg.Settings(grace=0), [reporters.text(stream)]) as guard, make():
        guard.report()
        assert guard.failed_reports == 0
    shown = stream.buffer.getvalue().decode("ascii")
    assert r"t\xfcte.py:2 in make()" in " ".join(shown.split())


@pytest.mark.parametrize("make", [reporters.text, reporters.console])
@pytest.mark.parametrize("stream", ["stderr", 3, object()])
def test_what_is_no_stream_is_refused(make, stream):
    with pytest.raises(
        cwg.ConfigurationError, match=r"expected a stream with write\(\) and flush\(\), got"
    ):
        make(stream)


def test_console_writes_the_same_in_colour_on_a_terminal():
    with terminal() as (stream, shown):
        report = report_leaks(reporters.console(stream), count=3)
    text = shown()
    assert ESCAPE.search(text)
    plain = ESCAPE.sub("", text)
    for line in cwg.render_text(report).splitlines():
        assert line in plain
    assert all(len(line.rstrip()) <= 80 for line in plain.splitlines())


def test_console_shows_how_bad_a_site_is_by_its_colour():
    starts = {}
    for severity, settings in {
        "WARNING": {},
        "CRITICAL": {"age_critical": 0},
    }.items():
        with terminal() as (stream, shown):
            report_leaks(reporters.console(stream), **settings)
        [starts[severity]] = re.findall(r"\x1b\[([0-9;]*)m\[1\] 1 LEAKED", shown())
    assert starts == {"WARNING": "33", "CRITICAL": "1;31"}


def test_console_folds_library_calls_and_dims_them():
    def through_a_library(function):
        return re.sub("x", lambda match: function() or "", "x")

    with terminal() as (stream, shown):
        through_a_library(lambda: report_leaks(reporters.console(stream)) and "")
    assert re.search(r"\x1b\[2m +\(\d+ library calls?\)", shown())


def test_console_has_a_table_of_the_peers_worst_first():
    with terminal() as (stream, shown):
        report_leaks(reporters.console(stream), count=12)
    lines = ESCAPE.sub("", shown()).splitlines()
    head = [line.split() for line in lines].index(["peer", "sockets", "closed", "unread"])
    rows = lines[head + 1 : head + 12]
    for row in rows[:10]:
        assert re.fullmatch(r"\s*127\.0\.0\.1:\d+\s+1\s+(less than )?\d\.\d s ago\s+3\s*", row), row
    assert rows[10].split() == ["and", "2", "more"]


@pytest.mark.parametrize("why", ["NO_COLOR", "no terminal", "dumb"])
def test_console_is_plain_where_colour_is_not_wanted(monkeypatch, why):
    if why == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    if why == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    if why == "no terminal":
        stream = io.StringIO()
        report = report_leaks(reporters.console(stream))
        text = stream.getvalue()
    else:
        with terminal() as (stream, shown):
            report = report_leaks(reporters.console(stream))
        text = shown()
    assert "\x1b" not in text
    for line in cwg.render_text(report).splitlines():
        assert line in text


def test_an_empty_no_color_has_no_effect(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "")
    with terminal() as (stream, shown):
        report_leaks(reporters.console(stream))
    assert ESCAPE.search(shown())


def test_labels_can_neither_steer_the_terminal_nor_write_markup():
    with terminal() as (stream, shown), cwg.label("[bold]\x1b[2J"):
        report_leaks(reporters.console(stream))
    assert "\x1b[2J" not in shown()
    assert r"[bold]\x1b[2J" in shown()


@pytest.mark.parametrize("make", ["reporters.console()", "reporters.named('console')"])
def test_without_rich_console_says_in_one_sentence_how_to_get_it(make):
    code = f"""
sys.modules["rich"] = sys.modules["rich.console"] = None
try:
    {make}
except cwg.MissingExtraError as error:
    print(error)
"""
    stdout, stderr = run(code)
    assert stderr == ""
    assert stdout.count("\n") == 1
    assert "needs rich: pip install 'closewait-guard[cli]' (" in stdout
