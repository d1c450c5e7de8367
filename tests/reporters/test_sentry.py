"""One event for each cause, through the program's own Sentry SDK, to a server on loopback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from contextlib import ExitStack
from dataclasses import replace

import pytest

import closewait_guard as cwg
from closewait_guard import reporters
from closewait_guard.testing import CapturingReporter, half_closed_pair
from leaking import PRELUDE, fetch, leaking_guard, report_leaks, run
from receivers import receiver

with warnings.catch_warnings():
    # It imports eventlet where that is installed, which warns.
    warnings.simplefilter("ignore")
    import sentry_sdk


class Envelopes(sentry_sdk.transport.Transport):
    """Keeps the events that the SDK would send."""

    def __init__(self):
        super().__init__()
        self.events = []

    def capture_envelope(self, envelope):
        self.events.append(json.loads(json.dumps(envelope.get_event(), default=str)))


@pytest.fixture
def sent():
    """The events that the program's own SDK sends."""
    transport, scope = Envelopes(), sentry_sdk.get_global_scope()
    # The integrations load every framework that is installed.
    sentry_sdk.init(dsn=DSN, transport=transport, default_integrations=False)
    yield transport.events
    sentry_sdk.get_client().close(timeout=0)
    scope.set_client(None)
    scope.clear_breadcrumbs()


DSN = "http://key@127.0.0.1:9/1"


@pytest.fixture
def server():
    with receiver() as served:
        yield served


def dsn_of(server):
    return f"http://key@127.0.0.1:{server.port}/1"


def test_each_cause_is_one_event_and_another_only_when_it_is_worse(sent):
    with ExitStack() as stack, leaking_guard("sentry", count=2) as guard:
        with cwg.label("GET /price"), ExitStack() as leaks:
            fetch(leaks)
            report = guard.report()
            guard.report()
            # Twice as many at the other line, which is another cause.
            first, other = sent
            for _ in range(2):
                fetch(stack)
            guard.report()
            assert len(sent) == 3
            guard.report()
    assert len(sent) == 3
    by_fingerprint = {group.fingerprint: group for group in report.by_site()}
    for event in (first, other):
        name, fingerprint = event["fingerprint"]
        group = by_fingerprint.pop(fingerprint)
        assert (name, event["level"]) == ("closewait_guard", "warning")
        assert event["tags"]["closewait_guard.code"] == group.code
        assert event["tags"]["closewait_guard.verdict"] == "leaked"
        shown = event["contexts"]["closewait_guard"]
        assert (shown["count"], shown["hint"]) == (group.count, group.hint)
        peers = {finding.observation.peer for finding in group.findings}
        assert set(shown["peers"]) == peers
        assert set(shown["held_by"]) == {each for one in group.findings for each in one.holders}
    assert not by_fingerprint
    [exception] = other["exception"]["values"]
    frames = exception["stacktrace"]["frames"]
    assert frames[-1]["function"] == "create_connection"
    [*_, own] = [frame for frame in frames if frame["in_app"]]
    assert own["filename"] == "leaking.py"
    assert own["context_line"] == "    ours, _ = stack.enter_context(half_closed_pair(unread))"
    assert own["pre_context"][-1] == 'def fetch(stack, unread=b""):'
    assert own["post_context"][0] == "    return ours"
    assert [e["contexts"]["closewait_guard"].get("labels") for e in (first, other)] == [
        None,
        "GET /price",
    ]


def test_what_was_closed_late_is_a_breadcrumb_of_the_program_s_next_event(sent):
    with cwg.Guard(cwg.Settings(grace=0), ["sentry"]) as guard:
        with half_closed_pair():
            guard.report()
        guard.report()
    sentry_sdk.capture_message("the program's own")
    leak, own = sent
    assert own["message"] == "the program's own"
    [crumb] = own["breadcrumbs"]["values"]
    assert (crumb["category"], crumb["level"]) == ("closewait_guard", "info")
    assert "closed late" in crumb["message"]
    assert "breadcrumbs" not in leak or not leak["breadcrumbs"]["values"]


def test_what_redact_removes_is_in_no_event(sent):
    password = "hunter2"  # In a line beside the one that is shown.
    with (
        cwg.label(f"token {password}"),
        leaking_guard(
            "sentry", redact=lambda text: text.replace("hunter2", "***").replace("stack", "***")
        ) as guard,
    ):
        guard.report()
    [event] = sent
    assert "hunter2" not in json.dumps(event)
    for frame in event["exception"]["values"][0]["stacktrace"]["frames"]:
        assert "pre_context" not in frame
        assert "stack" not in frame.get("context_line", "")


def test_more_causes_than_a_report_may_send_are_counted_and_come_with_the_next(sent):
    report = report_leaks(CapturingReporter())
    [leak] = report.leaks
    record = leak.observation.record

    def at_line(number):
        stack = tuple(replace(frame, lineno=number) for frame in record.stack)
        seen = replace(leak.observation, record=replace(record, stack=stack))
        return replace(leak, observation=seen)

    many = replace(report, findings=tuple(at_line(number) for number in range(1, 26)))
    report_to = reporters.sentry()
    report_to(many)
    events = sent.copy()
    assert len(events) == 21
    assert [event["message"] for event in events if "message" in event] == [
        "5 more causes, reported in full by other reporters"
    ]
    report_to(many)
    report_to(many)
    assert len(sent) == 26


def test_an_alert_is_an_event_until_it_ends(sent):
    report = report_leaks(CapturingReporter())
    alert = cwg.Alert(cwg.AlertKind.FD_LIMIT, cwg.Severity.CRITICAL, "900 of 1,000", {"used": 900})
    raised = replace(report, findings=(), alerts=(alert,))
    report_to = reporters.sentry()
    report_to(raised)
    report_to(raised)
    [event] = sent
    assert (event["level"], event["tags"]) == ("fatal", {"closewait_guard.kind": "fd_limit"})
    assert "900 of 1,000" in event["message"]
    report_to(replace(raised, alerts=(replace(alert, status=cwg.AlertStatus.RESOLVED),)))
    report_to(raised)
    _, again = sent
    assert "fd_limit resolved" in again["breadcrumbs"]["values"][-1]["message"]


@pytest.mark.whole_program
def test_no_answer_of_the_server_reaches_the_program(server):
    code = """
import sentry_sdk
for number in range(5):
    sentry_sdk.init(dsn=sys.argv[1], default_integrations=False)
    with cwg.Guard(cwg.Settings(grace=0), ["sentry"]) as guard, half_closed_pair():
        time.sleep(0.03)
        guard.report()
        sentry_sdk.flush(0.2)
        guard.report()
        assert guard.failed_reports == 0
"""
    server.answers[:] = ["hang", 500, (429, {"Retry-After": "60"}), "nonsense", "close"]
    assert run(code, dsn_of(server), options=("-W", "ignore")) == ("", "")
    assert server.answers == []


@pytest.mark.whole_program
def test_without_init_one_sentence_says_so_and_what_leaks_is_sent_later(server):
    code = """
import sentry_sdk
with cwg.Guard(cwg.Settings(grace=0), ["sentry"]) as guard, half_closed_pair():
    time.sleep(0.03)
    guard.report()
    guard.report()
    sentry_sdk.init(dsn=sys.argv[1], default_integrations=False)
    guard.report()
    assert guard.failed_reports == 0
    sentry_sdk.flush(20)
"""
    stdout, stderr = run(code, dsn_of(server), options=("-W", "ignore"))
    assert stdout == ""
    assert stderr == (
        "closewait-guard: reports are not sent to Sentry: the program has not called init(): \n"
    )
    assert b"leaked socket" in server.wait_for(1)[0]


@pytest.mark.whole_program
def test_the_last_report_is_sent_before_sigterm_and_the_sdk_s_own_connection_is_no_leak(server):
    code = """
import signal, sentry_sdk
sentry_sdk.init(dsn=sys.argv[1], default_integrations=False)
cwg.watch(interval=600, grace=0, reporters=["sentry"])
sentry_sdk.capture_message("first")
sentry_sdk.flush(20)
# The server has closed the connection that the SDK keeps.
end = time.monotonic() + 20
while not any(each.verdict == "stale_pool" for each in cwg.scan().findings):
    assert time.monotonic() < end, cwg.scan()
    time.sleep(0.01)
with half_closed_pair():
    time.sleep(0.03)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + code, dsn_of(server)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
    _, *leaks = server.wait_for(2)
    assert len(leaks) == len(server.posts) - 1 == 1
    assert b"leaked socket" in leaks[0]


def test_a_missing_sdk_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentry_sdk", None)
    with pytest.raises(cwg.exceptions.MissingExtraError, match="pip install sentry-sdk"):
        reporters.named("sentry")
