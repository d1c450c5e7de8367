"""Names from outside are only text to a terminal, log, markup parser or build server."""

from __future__ import annotations

import contextlib
import io
import json
import logging as standard
import re
import socket
import subprocess
import sys
import time
import unicodedata
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

import closewait_guard as cwg
import strategies
from closewait_guard import reporters
from closewait_guard._format import WIDTH, escape_line, wrap_text
from closewait_guard.testing import half_closed_pair
from command_line import COMMAND, environment

NASTY = [
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "a\x9b31mb",
    "[/bold]",
    "[link=http://x]y[/link]",
    "::error::pwned",
    "\n::error::pwned",
    "x ::error::pwned",
    "##[error]pwned",
    "##vso[task.setvariable]pwned",
    "##teamcity[pwned]",
    "%0A::error::pwned",
    "\r\nforged line",
    "\u202egnp.exe\u2066",
    "zero\u200bwidth\u00ad",
    "\u2028separated\u2029",
    "half \ud800 a pair",
    "nul\0byte",
    "Müller 日本 ☃",
]
nasty = st.sampled_from(NASTY) | st.text(max_size=6)
# In place of every name, one of these.
frames = st.builds(
    cwg.Frame,
    filename=nasty,
    lineno=strategies.counts,
    function=nasty,
    module=nasty,
    kind=st.sampled_from(cwg.FrameKind),
    source=nasty,
)
records = st.builds(
    cwg.SocketRecord,
    serial=st.integers(0, 10),
    pid=strategies.counts,
    opened_at=strategies.seconds,
    thread=nasty,
    task=nasty,
    labels=st.lists(nasty, max_size=2).map(tuple),
    context=st.dictionaries(nasty, nasty, max_size=2),
    origin=st.sampled_from(cwg.Origin),
    parent=st.none(),
    stack=st.lists(frames, max_size=2).map(tuple),
)
observations = st.builds(
    cwg.Observation,
    record=records,
    fd=strategies.counts,
    inode=st.none(),
    family=st.just("AF_UNIX"),
    type=st.just("SOCK_STREAM"),
    local=nasty,
    peer=nasty,
    state=st.sampled_from(cwg.State),
    evidence=st.sampled_from(cwg.Evidence),
    peer_closed_for=strategies.seconds,
    unread=st.none(),
    last_sent_for=st.none(),
    last_received_for=st.none(),
    tls=st.booleans(),
    close_called=st.booleans(),
)
leaks = st.builds(
    cwg.Finding,
    observation=observations,
    verdict=st.sampled_from(cwg.Verdict),
    severity=st.sampled_from(cwg.Severity),
    holders=st.lists(nasty, max_size=2).map(tuple),
    hint=nasty,
)
reports = st.builds(
    cwg.Report,
    schema=st.just(strategies.SCHEMA),
    taken_at=strategies.seconds,
    host=nasty,
    pid=strategies.counts,
    command=nasty,
    python=nasty,
    open_sockets=strategies.counts,
    fd_used=strategies.counts,
    fd_limit=strategies.counts,
    coverage=st.builds(
        cwg.Coverage,
        opened=strategies.counts,
        adopted=strategies.counts,
        dropped=strategies.counts,
        forgotten=strategies.counts,
        failures=strategies.counts,
        notes=st.lists(nasty, max_size=2).map(tuple),
    ),
    findings=st.lists(leaks, max_size=3).map(tuple),
    alerts=st.lists(
        st.builds(
            cwg.Alert,
            kind=st.sampled_from(cwg.AlertKind),
            severity=st.sampled_from(cwg.Severity),
            message=nasty,
            data=st.dictionaries(nasty, nasty, max_size=2),
        ),
        max_size=1,
    ).map(tuple),
    closed_late=st.lists(
        st.builds(cwg.ClosedLate, finding=leaks, after=strategies.seconds), max_size=1
    ).map(tuple),
)
thoroughly = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def assert_harmless(text):
    """Check that no character is invisible, and no line is a command to a build server."""
    for line in text.split("\n"):
        hidden = [c for c in line if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
        assert not hidden, (line, hidden)
        assert not line.lstrip().startswith("::"), line
        assert not re.search(r"##(vso|teamcity)?\[", line), line
    text.encode("utf-8")


@pytest.mark.parametrize("name", NASTY)
def test_a_line_is_harmless_and_ordinary_letters_stay(name):
    assert_harmless(escape_line(name))
    assert "\n" not in escape_line(name)
    assert escape_line("Müller 日本 ☃") == "Müller 日本 ☃"


def test_what_is_made_harmless_still_fits():
    for text in ("##[" + "y " * 40, "::" + "y " * 40, "x " * 38 + "::error::" + "y" * 60):
        assert max(map(len, wrap_text(text, "  "))) <= WIDTH


def test_data_of_an_alert_from_elsewhere_cannot_break_a_log():
    names = ["message", "name", "exc_info", "event", "args", "level", "msg", "stack_info", "self"]
    alert = cwg.Alert(cwg.AlertKind.COUNT, cwg.Severity.WARNING, "many", dict.fromkeys(names, "x"))
    coverage = cwg.Coverage(0, 0, 0, 0, 0, ())
    report = cwg.Report(
        strategies.SCHEMA, 0.0, "h", 1, "c", "3", 0, 0, 0, coverage, findings=(), alerts=(alert,)
    )
    logged = []
    handler = standard.Handler()
    handler.emit = logged.append
    logger = standard.Logger("names")  # noqa: LOG001
    logger.addHandler(handler)
    reporters.logging(logger)(report)
    with capture_logs() as events:
        reporters.structlog()(report)
    assert len(logged) == len(events) == 1
    assert logged[0].getMessage().endswith("many")
    assert events[0]["event"] == "socket_alert"
    for name in ("message", "exc_info", "event"):
        assert events[0][f"{name}_"] == "x"


@thoroughly
@given(reports)
def test_the_text_of_a_report_is_harmless(report):
    assert_harmless(cwg.render_text(report))
    stream = io.StringIO()
    reporters.text(stream)(report)
    assert_harmless(stream.getvalue())
    assert_harmless(str(cwg.SocketLeakError(cwg.render_text(report), report)))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@thoroughly
@given(reports)
def test_on_a_terminal_only_our_own_colours_are_escape_sequences(report):
    terminal = Terminal()
    reporters.console(terminal)(report)
    without_colours = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert_harmless(without_colours)
    # Not parsed as markup, which would be missing in the output.
    for leak in report.findings:
        if leak.observation.peer == "[/bold]" and len(report.findings) == 1:
            assert "[/bold]" in without_colours


@thoroughly
@given(reports)
def test_log_events_are_harmless(report):
    logged = []

    class Logger:
        def __getattr__(self, level):
            return lambda event, **fields: logged.append((event, fields))

        def critical(self, event, **fields):
            logged.append((event, fields))

    reporters.structlog(Logger())(report)
    handler = standard.Handler()
    handler.emit = lambda record: logged.append((record.getMessage(), vars(record)))
    logger = standard.Logger("names")  # noqa: LOG001
    logger.addHandler(handler)
    reporters.logging(logger)(report)
    for sentence, fields in logged:
        assert_harmless(sentence)
        for name, value in fields.items():
            assert_harmless(name)
            assert_harmless(str(value))


@thoroughly
@given(reports)
def test_warnings_are_harmless(report):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reporters.warn()(report)
    for warning in caught:
        assert_harmless(str(warning.message))
        assert_harmless(warning.filename)


@thoroughly
@given(reports)
def test_json_holds_the_true_names_in_valid_utf_8(report):
    text = json.dumps(cwg.to_dict(report))
    text.encode("utf-8")
    data = json.loads(text)
    assert data["command"] == report.command
    assert [leak["observation"]["peer"] for leak in data["findings"]] == [
        leak.observation.peer for leak in report.findings
    ]


@thoroughly
@given(st.lists(reports, min_size=1, max_size=2), nasty, nasty)
def test_what_pytest_shows_is_harmless(found, owner, reason):
    from pathlib import Path

    from closewait_guard.pytest_plugin._findings import Outcome, OwnerFinding, github_commands
    from closewait_guard.pytest_plugin._text import failure_text, headline, summary_lines

    findings = [
        OwnerFinding(owner, owner, "test", outcome, reason=reason, report=report, worker="gw0")
        for report, outcome in zip(found, (Outcome.FAILED, Outcome.ALLOWED), strict=False)
    ]
    with contextlib.suppress(ValueError):  # A path must not contain NUL.
        for line in summary_lines(findings, Path.cwd(), whole_stacks=True):
            assert_harmless(line)
        for finding in findings:
            assert_harmless(failure_text(finding, Path.cwd(), whole_stacks=True))
            assert_harmless(headline(finding, Path.cwd()))
        for command in github_commands(findings, Path.cwd()):
            head, _, said = command.removeprefix("::").partition("::")
            assert re.fullmatch(r"error file=[^,:]*,line=\d+", head), command
            assert_harmless(head)
            assert not re.search(r"[\r\n\x00-\x1f\x7f-\x9f]", said), command


def test_the_peer_of_an_abstract_socket_steers_no_terminal():
    name = b"\0\x1b[31m::error::\xe2\x80\xae"
    with cwg.Guard(cwg.Settings(grace=0)) as guard, socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(name)
            server.accept()[0].close()
            report = guard.scan()
            assert [leak.verdict for leak in report.leaks] == [cwg.Verdict.LEAKED]
            text = cwg.render_text(report)
    assert_harmless(text)
    assert "\\x1b[31m::error::" in text


LEAKS_UNDER_A_NAME = """
import ctypes, socket, sys, time
ctypes.CDLL(None).prctl(15, b"\\x1b[31m::evil", 0, 0, 0)
server = socket.create_server(("127.0.0.1", 0))
kept = socket.create_connection(server.getsockname())
server.accept()[0].close()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("command", ["scan", "watch"])
def test_a_process_cannot_name_itself_to_steer_a_terminal(command, tmp_path):
    program = tmp_path / "\x1b[31m evil.py"
    program.write_text(LEAKS_UNDER_A_NAME)
    leaking = subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with leaking:
        assert leaking.stdout.readline() == b"ready\n"
        time.sleep(0.05)
        arguments = [command, str(leaking.pid), *(["--count", "1"] if command == "watch" else [])]
        done = subprocess.run(
            [*COMMAND, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment(CLOSEWAIT_GUARD_GRACE="0"),
        )
        leaking.stdin.close()
    assert "evil" in done.stdout
    assert_harmless(done.stdout)
    assert_harmless(done.stderr)


def test_a_test_id_gives_no_order_to_a_build_server(suite, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    source = """
@pytest.mark.parametrize("value", [1], ids=["::error::x\\x1b[31m"])
def test_it(value):
    keep(socket.socket())
"""
    result = suite.run(source, "--socket-leaks=fail")
    orders = [line for line in result.outlines if line.lstrip().startswith("::")]
    assert len(orders) == 1, "\n".join((*result.outlines, *result.errlines))
    assert orders[0].startswith("::error file=test_it.py,line=")
    assert "\x1b" not in "".join(result.outlines)


def redact(text):
    return "".join("*" if c.isalnum() else c for c in text)


SECRETS = {
    "label": "tenant-4711",
    "thread": "worker-of-alice",
    "task": "import-of-bob",
    "key": "customer carol",
    "value": "secret-value",
    "number": 471_147_114_711,
}


def secret_report(redactor):
    import asyncio
    import threading

    found = []

    async def opens():
        asyncio.current_task().set_name(SECRETS["task"])
        with cwg.label(SECRETS["label"]), half_closed_pair() as (ours, _):
            found.append(guard.report())
            del ours

    context = {SECRETS["key"]: SECRETS["value"], "count": SECRETS["number"]}
    wanted = cwg.Settings(grace=0, redact=redactor, context=lambda: context)
    with cwg.Guard(wanted, [lambda report: None]) as guard:
        thread = threading.Thread(target=lambda: asyncio.run(opens()), name=SECRETS["thread"])
        thread.start()
        thread.join()
    return found[0]


def everything_of(report):
    stream = io.StringIO()
    reporters.text(stream)(report)
    events = []
    handler = standard.Handler()
    handler.emit = lambda record: events.append(repr(vars(record)))
    logger = standard.Logger("secrets")  # noqa: LOG001
    logger.addHandler(handler)
    reporters.logging(logger)(report)
    return stream.getvalue() + json.dumps(cwg.to_dict(report)) + "".join(events) + repr(report)


def test_redaction_sees_every_value_that_the_program_or_a_peer_has_chosen():
    plain, masked = everything_of(secret_report(None)), everything_of(secret_report(redact))
    for secret in map(str, SECRETS.values()):
        assert secret in plain
        assert secret not in masked, secret


@pytest.mark.parametrize(
    "failing",
    [lambda text: 1 / 0, lambda text: None, lambda text: b"x", lambda text: [].x],
    ids=["raises", "none", "bytes", "attribute"],
)
def test_where_redaction_fails_nothing_is_reported_and_that_is_said(failing):
    report = secret_report(failing)
    text = everything_of(report)
    for secret in map(str, SECRETS.values()):
        assert secret not in text, secret
    assert any("texts that the redact callable failed on" in note for note in report.coverage.notes)


def test_our_own_log_events_hold_no_variables_and_no_values_from_before_redaction():
    code = """
import socket, sys, structlog, threading, time
import closewait_guard as cwg
from closewait_guard import _pipeline
from closewait_guard.testing import half_closed_pair
secret = "tenant-" + str(4000 + 711)
def failing(self, *_, **__):
    local = secret
    raise ValueError("about " + secret)
structlog.configure(processors=[
    structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=True)),
    structlog.processors.JSONRenderer(),
])
_pipeline.Pipeline.next_in_series = failing
guard = cwg.install(redact=lambda text: text.replace(secret, "***"))
monitor = cwg.watch(interval=0.05)
time.sleep(0.5)
monitor.stop()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert "a periodic report failed" in output
    assert "ValueError: about ***" in output
    assert "next_in_series" in output
    assert "tenant-4711" not in output
