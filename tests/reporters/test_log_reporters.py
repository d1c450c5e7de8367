"""One event for each site and each alert, through the program's own structlog or logging."""

from __future__ import annotations

import io
import json
import logging
import os
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
import structlog

import closewait_guard as cwg
from closewait_guard import reporters
from closewait_guard._judge import threshold_alerts
from closewait_guard.reporters import SocketLeakWarning
from closewait_guard.testing import CapturingReporter, connected_pair, half_closed_pair
from leaking import fetch, leaking_guard, report_leaks, run

KEYS = {
    "code",
    "code_url",
    "held_by",
    "package",
    "caller",
    "thread_name",
    "verdict",
    "severity",
    "is_leak",
    "count",
    "site",
    "function",
    "oldest_s",
    "is_lower_bound",
    "peers",
    "hint",
    "fingerprint",
    "pid",
    "new",
    "stack",
    "state",
    "unread",
}


@pytest.fixture
def own_structlog():
    """A program's own configuration: JSON lines with levels and bound context variables."""
    stream = io.StringIO()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(request="r7")
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def all_at_once(report):
    """The report, extended by every kind of event."""
    leak = report.findings[0]
    alert = cwg.Alert(cwg.AlertKind.COUNT, cwg.Severity.WARNING, "many", {"count": 7})
    return replace(
        report,
        alerts=(alert, replace(alert, status=cwg.AlertStatus.RESOLVED)),
        closed_late=(cwg.ClosedLate(leak, 9.5), cwg.ClosedLate(leak, 12.25)),
    )


def test_structlog_logs_one_event_for_each_site_with_flat_keys(own_structlog):
    report = report_leaks(reporters.structlog(), count=3)
    [event] = own_structlog()
    leak = report.findings[0]
    assert event.keys() == KEYS | {"event", "level", "request"}
    assert event["event"] == "socket_leak"
    assert (event["verdict"], event["severity"], event["is_leak"]) == ("leaked", "warning", True)
    assert (event["count"], event["pid"]) == (3, os.getpid())
    assert event["site"] == leak.observation.record.site.place
    assert event["function"] == "fetch"
    assert event["oldest_s"] == pytest.approx(
        max(leak.observation.peer_closed_for for leak in report.findings), abs=0.001
    )
    assert all(leak.observation.peer in event["peers"] for leak in report.findings)
    assert event["hint"] == leak.hint
    assert event["code"] == leak.code
    assert event["code_url"].endswith(f"/codes/#{leak.code.lower()}")
    assert event["held_by"] == leak.holders[0]
    assert (event["package"], event["caller"]) == (leak.package, leak.caller) == ("leaking",) * 2
    assert event["fingerprint"] == report.by_site()[0].fingerprint
    assert event["request"] == "r7"


def test_an_event_has_the_program_s_calls_the_state_and_how_many_sockets_are_new(own_structlog):
    with ExitStack() as stack, cwg.Guard(cwg.Settings(grace=0), ["structlog"]) as guard:
        for number in (2, 1, 0):
            for _ in range(number):
                fetch(stack, b"abc")
            time.sleep(0.03)
            guard.report()
    seen = [event for event in own_structlog() if event["function"] == "fetch"]
    # The third line of this test opens them both times.
    assert [(each["count"], each["new"]) for each in seen] == [(2, 2), (3, 1), (3, 0)]
    first = seen[0]
    assert (first["state"], first["unread"]) == ("CLOSE_WAIT", 6)
    inner, outer, *_ = first["stack"].split(" < ")
    assert inner.startswith("leaking:")
    assert inner.endswith(" fetch")
    assert outer.startswith(f"{__name__}:")


class FlatJson(logging.Formatter):
    """As python-json-logger does it: what is on the record beyond the standard attributes."""

    def format(self, record):
        standard = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}
        extra = {name: value for name, value in vars(record).items() if name not in standard}
        return json.dumps({"message": record.getMessage(), "level": record.levelname, **extra})


def test_a_line_of_json_is_flat_and_has_what_the_program_s_context_had():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(FlatJson())
    logger = logging.getLogger("flat")
    logger.addHandler(handler)
    logger.propagate = False
    settings = {"context": lambda: {"tenant": "acme", "message": 3}}
    report_leaks(reporters.logging(logger), **settings)
    document = json.loads(stream.getvalue())
    assert (document["event"], document["level"]) == ("socket_leak", "WARNING")
    assert (document["tenant"], document["message_"], document["new"]) == ("acme", 3, 1)
    assert not any(isinstance(value, dict | list) for value in document.values())


def test_each_event_of_a_leak_names_the_packages_that_are_known(own_structlog):
    report = report_leaks()
    [leak] = report.findings
    leak = replace(leak, package="httpx 0.28.1", via="litellm 1.80", caller="")
    late = cwg.ClosedLate(leak, 9.5)
    reporters.structlog()(replace(report, findings=(leak,), closed_late=(late,)))
    for event in own_structlog():
        assert (event["package"], event["via"]) == ("httpx 0.28.1", "litellm 1.80")
        assert "caller" not in event


def test_an_age_that_is_a_lower_bound_says_so_in_each_message(own_structlog, caplog):
    caplog.set_level(logging.DEBUG)
    with leaking_guard(age_warning=0) as guard:
        report = guard.report()
    [leak] = report.findings
    observation = replace(leak.observation, peer_closed_for=41.0, is_lower_bound=True)
    leak = replace(leak, observation=observation)
    bound = replace(report, alerts=(), findings=(leak,), closed_late=(cwg.ClosedLate(leak, 42.0),))
    reporters.structlog()(bound)
    reporters.logging()(bound)
    leaked, closed_late = own_structlog()
    assert leaked["oldest_s"] == 41
    assert leaked["is_lower_bound"] is closed_late["is_lower_bound"] is True
    assert ", for at least 41 s: " in caplog.messages[0]
    assert " closed late, after at least 42 s" in caplog.messages[1]
    assert "CLOSED LATE, after at least 42 s: " in cwg.render_text(bound)
    [alert] = threshold_alerts(bound, cwg.Settings(age_warning=0))
    assert "; the oldest for at least 41 s, opened at " in alert.message


@pytest.mark.parametrize(
    ("settings", "level"),
    [({"age_warning": 0}, "warning"), ({"age_critical": 0}, "critical")],
)
def test_the_level_comes_from_the_severity(own_structlog, settings, level):
    with leaking_guard(**settings) as guard:
        report = replace(guard.report(), alerts=())
    reporters.structlog()(report)
    [event] = own_structlog()
    assert event["level"] == event["severity"] == level


def test_a_leak_is_logged_at_least_as_a_warning(own_structlog, caplog):
    report = report_leaks(CapturingReporter())
    reporters.structlog()(report)
    reporters.logging()(report)
    [event] = own_structlog()
    assert (event["level"], event["severity"]) == ("warning", "warning")
    [record] = caplog.records
    assert (record.levelname, record.severity) == ("WARNING", "warning")


def test_a_severe_finding_that_is_no_leak_has_its_level_and_is_not_named_a_leak(
    own_structlog, caplog
):
    report = report_leaks(CapturingReporter())
    finding = replace(
        report.findings[0],
        verdict=cwg.Verdict.CLOSED_ELSEWHERE,
        severity=cwg.Severity.WARNING,
    )
    report = replace(report, findings=(finding,))
    reporters.structlog()(report)
    reporters.logging()(report)
    [event] = own_structlog()
    assert (event["event"], event["level"]) == ("socket_finding", "warning")
    [record] = caplog.records
    assert (record.event, record.levelname) == ("socket_finding", "WARNING")


def test_findings_that_are_no_leaks_are_logged_at_debug_level(own_structlog, caplog):
    caplog.set_level(logging.DEBUG)
    with half_closed_pair() as (ours, _), cwg.Guard(cwg.Settings(grace=60)) as guard:
        ours.send(b"still sending")
        report = guard.scan()
    assert [leak.is_leak for leak in report.findings] == [False]
    reporters.structlog()(report)
    reporters.logging()(report)
    [event] = own_structlog()
    assert (event["level"], event["is_leak"]) == ("debug", False)
    assert event["event"] == "socket_finding"
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_alerts_and_sockets_closed_late_are_events_too(own_structlog):
    report = all_at_once(report_leaks(CapturingReporter()))
    reporters.structlog()(report)
    raised, resolved, leak, closed = own_structlog()
    assert raised == {
        "event": "socket_alert",
        "level": "warning",
        "kind": "count",
        "status": "raised",
        "severity": "warning",
        "text": "many",
        "count": 7,
        "pid": os.getpid(),
        "request": "r7",
    }
    assert (resolved["status"], resolved["level"]) == ("resolved", "info")
    assert closed["event"] == "socket_closed_late"
    assert (closed["count"], closed["after_s"], closed["level"]) == (2, 12.25, "info")
    for key in ("site", "function", "fingerprint", "verdict", "pid"):
        assert closed[key] == leak[key]


def test_every_value_is_a_plain_scalar():
    report = all_at_once(report_leaks(CapturingReporter()))
    with structlog.testing.capture_logs() as events:
        reporters.structlog()(report)
    values = [value for event in events for value in event.values()]
    assert {type(value) for value in values} <= {str, int, float, bool, type(None)}


def test_a_leak_of_unknown_origin_is_logged_without_a_site(own_structlog):
    with half_closed_pair():
        report_leaks(reporters.structlog())
    adopted = [event for event in own_structlog() if event["site"] is None]
    assert [event["function"] for event in adopted] == [None]


def test_a_logger_of_the_program_s_own_is_used():
    logger = structlog.wrap_logger(structlog.testing.CapturingLogger(), processors=[])
    logger = logger.bind(service="shop")
    report_leaks(reporters.structlog(logger))
    [call] = logger._logger.calls
    assert call.method_name == "warning"
    assert call.kwargs["service"] == "shop"


@pytest.mark.parametrize("logger", [3, "name", object()])
def test_what_is_no_structlog_logger_is_refused(logger):
    with pytest.raises(cwg.ConfigurationError, match="expected a structlog logger"):
        reporters.structlog(logger)


def test_a_configuration_made_after_the_reporter_counts(own_structlog):
    reporter = reporters.structlog()
    stream = io.StringIO()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(stream))
    report_leaks(reporter)
    assert json.loads(stream.getvalue())["event"] == "socket_leak"
    assert own_structlog() == []


def test_neither_structlog_nor_logging_is_configured_or_imported_before_it_is_needed():
    code = """
import logging
assert "structlog" not in sys.modules
with cwg.Guard(cwg.Settings(grace=0), ["logging"]) as guard, half_closed_pair():
    assert "structlog" not in sys.modules, "logging needs no structlog"
    reporters.structlog()
    time.sleep(0.03)
    guard.report()
import structlog
assert not structlog.is_configured()
assert logging.getLogger().handlers == logging.getLogger("closewait_guard").handlers == []
assert logging.getLogger("closewait_guard").level == logging.NOTSET
"""
    stdout, stderr = run(code)
    assert stdout == ""
    # What the standard library does with a warning that no handler takes.
    assert stderr.startswith("1 socket leaked, opened at <string>")
    assert stderr.count("\n") == 1


def test_logging_logs_a_message_and_the_fields_as_extra(caplog):
    caplog.set_level(logging.INFO)
    report = report_leaks(reporters.logging(), count=2)
    [record] = caplog.records
    site = report.findings[0].observation.record.site.place
    assert record.name == "closewait_guard"
    assert record.getMessage().startswith(f"2 sockets leaked, opened at {site} to 127.0.0.1:")
    assert record.event == "socket_leak"
    assert {name: getattr(record, name) for name in KEYS}["count"] == 2


@pytest.mark.parametrize("given", ["shop.sockets", logging.getLogger("shop.sockets")])
def test_logging_goes_to_the_logger_that_was_given(caplog, given):
    caplog.set_level(logging.INFO, logger="shop.sockets")
    report_leaks(reporters.logging(given))
    assert [record.name for record in caplog.records] == ["shop.sockets"]


def test_an_adapter_adds_its_fields_to_those_of_the_event(caplog):
    class Prefixing(logging.LoggerAdapter):
        def process(self, msg, kwargs):
            msg, kwargs = super().process(msg, kwargs)
            return f"[shop] {msg}", kwargs

    caplog.set_level(logging.INFO)
    report_leaks(reporters.logging(Prefixing(logging.getLogger("shop"), {"service": "shop"})))
    [record] = caplog.records
    assert record.getMessage().startswith("[shop] 1 socket leaked")
    assert (record.service, record.event, record.count) == ("shop", "socket_leak", 1)


def test_logging_respects_the_levels_that_are_set(caplog):
    caplog.set_level(logging.ERROR)
    report_leaks(reporters.logging())
    assert caplog.records == []


@pytest.mark.parametrize("logger", [3, object(), print])
def test_what_is_no_logger_is_refused(logger):
    with pytest.raises(cwg.ConfigurationError, match="expected a logger or its name"):
        reporters.logging(logger)


def test_fields_never_clash_with_attributes_of_a_log_record(caplog):
    """The alerts of a real series have fields of their own, and all of them are logged."""
    caplog.set_level(logging.DEBUG)
    clock = iter(range(0, 10**6, 60)).__next__
    settings = cwg.Settings(
        grace=0, growth_window=10, count_warning=1, age_warning=0, fd_used_critical=1e-6
    )
    with ExitStack() as stack, cwg.Guard(settings, ["logging"], clock=clock) as guard:
        for _ in range(14):
            fetch(stack)
            time.sleep(0.02)
            guard.report()
        assert guard.failed_reports == 0
    kinds = {record.kind for record in caplog.records if record.event == "socket_alert"}
    assert kinds == {"count", "age", "fd_limit", "growth"}


def test_an_owner_of_sockets_is_named_in_messages_and_has_no_age(caplog):
    class Client:
        def __init__(self, sock):
            self.sock = sock

        def close(self):
            self.sock.close()

    with cwg.Guard(cwg.Settings(grace=0), reporters=["logging", "warn"]) as guard:
        guard.track(Client)
        with connected_pair() as (ours, theirs):
            peer = "{}:{}".format(*theirs.getsockname())
            Client(ours)
            with pytest.warns(SocketLeakWarning, match="unclosed .*Client, opened in "):
                guard.report()
    (message,) = [each for each in caplog.messages if "unclosed" in each]
    name = f"{__name__}.{Client.__qualname__}"
    assert message.startswith(f"1 {name} unclosed, opened at {__file__}:")
    assert f" to {peer}: close it in a `finally` block" in message
