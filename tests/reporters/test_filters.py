"""Reporters that filter for another: by what has changed, by severity, by time."""

from __future__ import annotations

import io
import resource
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
import structlog

import closewait_guard as cwg
from closewait_guard import reporters
from closewait_guard.reporters.filters import Quiet
from closewait_guard.testing import CapturingReporter, half_closed_pair
from leaking import fetch, leaking_guard, report_leaks

Severity, Status, Kind = cwg.Severity, cwg.AlertStatus, cwg.AlertKind


class Unreliable(CapturingReporter):
    """A reporter that raises as often as `failures` says."""

    failures = 0

    def __call__(self, report):
        if self.failures:
            self.failures -= 1
            raise OSError("try again later")
        super().__call__(report)


class Watched:
    """A guard with one reporter, and a short pause before each report."""

    def __init__(self, stack, wrap, **settings):
        self.reporter = Unreliable()
        self.stack = stack
        settings = {"grace": 0, **settings}
        self.guard = stack.enter_context(cwg.Guard(cwg.Settings(**settings), [wrap(self.reporter)]))

    def leak(self, count=1):
        return [fetch(self.stack) for _ in range(count)]

    def report(self):
        """The report that the reporter received, or None."""
        time.sleep(0.03)
        before = len(self.reporter.reports)
        with structlog.testing.capture_logs():
            self.guard.report()
        assert len(self.reporter.reports) <= before + 1
        return self.reporter.reports[-1] if len(self.reporter.reports) > before else None


@pytest.fixture
def watched():
    with ExitStack() as stack:
        yield lambda wrap, **settings: Watched(stack, wrap, **settings)


# changes


def test_changes_reports_a_site_once_and_again_when_its_leaks_have_doubled(watched):
    it = watched(reporters.changes)
    assert it.report() is None
    for more, reported in ((2, 2), (0, None), (1, None), (1, 4), (3, None), (1, 8)):
        it.leak(more)
        report = it.report()
        assert (report and len(report.findings)) == reported, more


def test_changes_reports_a_new_site_and_counts_the_known_ones_that_it_leaves_out(watched):
    it = watched(reporters.changes)
    it.leak(2)
    assert len(it.report().findings) == 2
    it.stack.enter_context(half_closed_pair())
    third = it.report()
    assert (len(third.findings), third.omitted) == (1, 2)
    assert "1 leaked socket from 1 place.  2 leaks left out." in cwg.render_text(third)


def test_changes_reports_when_it_got_worse_and_not_when_it_got_better_again(watched):
    # The share of the limit at which three sockets in CLOSE_WAIT are critical, and two are not.
    share = 2.2 / resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    it = watched(reporters.changes, fd_share_critical=share)
    for more, severity in ((2, "warning"), (1, "critical")):
        [*_, last] = it.leak(more)
        assert {leak.severity for leak in it.report().findings} == {severity}
    last.close()
    assert it.report() is None


def test_changes_reports_what_closed_late_when_the_site_has_no_leak_left(watched):
    it = watched(reporters.changes)
    first, second = it.leak(2)
    leaks = it.report().findings
    first.close()
    assert it.report() is None, "the site still leaks"
    second.close()
    it.reporter.failures = 1
    assert it.report() is None, "it failed, and nothing is lost"
    closed = it.report().closed_late
    assert [each.finding.observation.record for each in closed] == [
        leak.observation.record for leak in leaks
    ]
    assert all(0.02 < each.after < 5 for each in closed)
    text = cwg.render_text(it.reporter.reports[-1])
    assert "CLOSED LATE, after 0." in text
    assert "2 sockets opened at" in " ".join(text.split())
    assert it.report() is None


def test_changes_never_reports_what_is_closing_at_this_moment(watched):
    it = watched(reporters.changes, grace=60)
    received = CapturingReporter()
    reporter = reporters.changes(received)
    it.leak(2)
    time.sleep(0.03)
    closing = it.guard.scan()
    assert {each.verdict for each in closing.findings} == {cwg.Verdict.CLOSING}
    reporter(closing)
    alert = cwg.Alert(Kind.AGE, Severity.WARNING, "old", {})
    reporter(replace(closing, alerts=(alert,)))
    assert [report.findings for report in received.reports] == [()]


def test_changes_does_not_report_the_end_of_what_it_never_reported(watched):
    it = watched(reporters.changes)
    [sock] = it.leak(1)
    it.reporter.failures = 1
    assert it.report() is None
    sock.close()
    assert it.report() is None


def test_findings_that_are_no_leaks_come_along_but_cause_no_report(watched):
    it = watched(reporters.changes, grace=60)
    with half_closed_pair() as (ours, _):
        time.sleep(0.03)
        ours.send(b"still sending")
        assert [leak.is_leak for leak in it.guard.scan().findings] == [False]
        assert it.report() is None


def test_changes_reports_alerts_whatever_the_leaks(watched):
    it = watched(reporters.changes, count_warning=0)
    [sock] = it.leak(1)
    assert [(alert.kind, alert.status) for alert in it.report().alerts] == [("count", "raised")]
    assert it.report() is None
    sock.close()
    assert [(alert.kind, alert.status) for alert in it.report().alerts] == [("count", "resolved")]


def test_a_leak_whose_reporter_raised_is_in_the_next_report_again(watched):
    it = watched(reporters.changes)
    it.leak(1)
    it.reporter.failures = 1
    assert it.report() is None
    assert it.guard.failed_reports == 1
    assert len(it.report().findings) == 1


# at_least


@pytest.mark.parametrize(
    ("severity", "settings", "expected"),
    [
        ("info", {}, 2),
        ("warning", {}, 2),
        (Severity.CRITICAL, {"count_warning": 1}, None),
        ("critical", {"age_critical": 0}, 2),
    ],
)
def test_at_least_reports_what_is_severe_enough_or_nothing(watched, severity, settings, expected):
    it = watched(lambda reporter: reporters.at_least(severity, reporter), **settings)
    it.leak(2)
    report = it.report()
    assert (report and len(report.findings)) == expected


def test_at_least_counts_what_it_leaves_out(watched):
    it = watched(lambda reporter: reporters.at_least("critical", reporter), age_critical=0.15)
    it.leak(1)
    time.sleep(0.2)
    it.leak(1)
    report = it.report()
    assert ([leak.severity for leak in report.findings], report.omitted) == (["critical"], 1)


def test_at_least_reports_the_end_of_what_it_reported_even_if_it_was_better_by_then(watched):
    # The share of the limit at which two sockets in CLOSE_WAIT are critical, and one is not.
    share = 1.5 / resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    it = watched(lambda reporter: reporters.at_least("critical", reporter), fd_share_critical=share)
    first, second = it.leak(2)
    assert len(it.report().findings) == 2
    first.close()
    assert len(it.report().closed_late) == 1
    assert it.report() is None, "one socket is not critical"
    second.close()
    assert len(it.report().closed_late) == 1


def test_at_least_does_not_report_the_end_of_what_it_never_reported(watched):
    it = watched(lambda reporter: reporters.at_least("critical", reporter))
    [sock] = it.leak(1)
    assert it.report() is None
    sock.close()
    assert it.report() is None


def reported_alerts(severity, *steps):
    """The alerts that `at_least` hands on, of one in each report."""
    received = CapturingReporter()
    reporter = reporters.at_least(severity, received)
    with cwg.Guard() as guard:
        report = guard.scan()
    for kind, how_bad, status, site in steps:
        alert = cwg.Alert(kind, how_bad, "", {"site": site}, status)
        reporter(replace(report, findings=(), alerts=(alert,)))
    return [(report.alerts[0].severity, report.alerts[0].status) for report in received.reports]


def test_at_least_reports_that_an_alert_that_it_reported_got_better():
    steps = [
        (Kind.AGE, Severity.WARNING, Status.RAISED, "a"),
        (Kind.AGE, Severity.CRITICAL, Status.CHANGED, "b"),
        (Kind.AGE, Severity.WARNING, Status.CHANGED, "c"),
        (Kind.AGE, Severity.WARNING, Status.RESOLVED, "c"),
    ]
    assert reported_alerts("critical", *steps) == [("critical", "changed"), ("warning", "changed")]
    assert len(reported_alerts("warning", *steps)) == 4


def test_at_least_distinguishes_the_alerts_of_two_sites():
    steps = [
        (Kind.GROWTH, Severity.CRITICAL, Status.RAISED, "a"),
        (Kind.GROWTH, Severity.WARNING, Status.RAISED, "b"),
        (Kind.GROWTH, Severity.WARNING, Status.RESOLVED, "b"),
        (Kind.GROWTH, Severity.CRITICAL, Status.RESOLVED, "a"),
    ]
    assert reported_alerts("critical", *steps) == [("critical", "raised"), ("critical", "resolved")]


# every


def test_every_hands_on_the_first_report_and_then_one_in_so_many_seconds(watched):
    now = [1000.0]
    it = watched(lambda reporter: reporters.every(60, reporter, clock=lambda: now[0]))
    it.leak(1)
    assert it.report() is not None
    for seconds, is_reported in ((30, False), (29, False), (1, True), (59, False), (120, True)):
        now[0] += seconds
        assert (it.report() is not None) is is_reported


def test_every_keeps_alerts_and_ends_for_the_next_report_that_it_hands_on(watched):
    now = [0.0]
    it = watched(
        lambda reporter: reporters.every(60, reporter, clock=lambda: now[0]), count_warning=0
    )
    it.report()
    [sock] = it.leak(1)
    assert it.report() is None
    sock.close()
    assert it.report() is None
    now[0] = 60
    it.reporter.failures = 1
    assert it.report() is None, "it failed, and nothing is lost"
    now[0] = 120
    report = it.report()
    assert [alert.status for alert in report.alerts] == ["raised", "resolved"]
    assert len(report.closed_late) == 1
    now[0] = 180
    assert it.report().alerts == ()


def test_what_waits_is_bounded():
    received = CapturingReporter()
    now = [0.0]
    reporter = reporters.every(60, received, clock=lambda: now[0])
    with leaking_guard() as guard:
        report = guard.report()
    alert = cwg.Alert(Kind.COUNT, Severity.WARNING, "", {})
    closed = cwg.ClosedLate(report.findings[0], 1)
    reporter(report)
    for number in range(30):
        reporter(replace(report, alerts=(replace(alert, message=str(number)),) * 100))
        reporter(replace(report, closed_late=(closed,) * 100))
    now[0] = 60
    reporter(report)
    assert (len(received.reports[-1].alerts), len(received.reports[-1].closed_late)) == (1000, 1000)
    assert received.reports[-1].alerts[-1].message == "29"


def test_changes_within_every_loses_nothing(watched):
    now = [0.0]
    it = watched(
        lambda reporter: reporters.every(60, reporters.changes(reporter), clock=lambda: now[0])
    )
    first, second = it.leak(2)
    assert len(it.report().findings) == 2
    now[0] = 30
    second.close()
    it.leak(1)
    assert it.report() is None
    now[0] = 60
    report = it.report()
    assert (len(report.findings), len(report.closed_late), report.omitted) == (1, 0, 1)
    first.close()
    now[0] = 90
    assert it.report() is None
    now[0] = 120
    assert len(it.report().closed_late) == 2, "the site has no leak left"


# All of them.


@pytest.mark.parametrize(
    "wrap",
    [
        reporters.changes,
        lambda reporter: reporters.at_least("info", reporter),
        lambda reporter: reporters.every(1, reporter),
    ],
)
def test_what_wraps_refuses_what_is_no_reporter_and_closes_what_is_one(wrap, tmp_path):
    with pytest.raises(cwg.ConfigurationError, match="expected a callable that takes a report"):
        wrap("text")
    inner = reporters.json_lines(tmp_path / "leaks.jsonl")
    wrapped = wrap(inner)
    assert repr(inner) in repr(wrapped)
    wrapped.close()
    assert inner._file.fileno() == -1
    wrap(reporters.text(io.StringIO())).close()


@pytest.mark.parametrize("severity", ["bad", "", None, 3, "WARNING"])
def test_an_unknown_severity_is_refused_with_the_known_ones(severity):
    with pytest.raises(
        cwg.ConfigurationError,
        match=r"^at_least: unknown severity .* Severities: info, warning, critical$",
    ):
        reporters.at_least(severity, print)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "60", None, True])
def test_what_is_no_time_is_refused(seconds):
    sentence = "expected a non-negative number of seconds"
    with pytest.raises(cwg.ConfigurationError, match=sentence):
        reporters.every(seconds, print)


def test_a_burst_of_connections_that_are_closing_at_this_moment_is_no_change():
    reporter = CapturingReporter()
    settings = cwg.Settings(grace=60, count_warning=5)
    with ExitStack() as stack, cwg.Guard(settings, [reporters.changes(reporter)]) as guard:
        for _ in range(10):
            stack.enter_context(half_closed_pair())
        assert {found.verdict for found in guard.report().findings} == {cwg.Verdict.CLOSING}
        assert reporter.reports == []
    with ExitStack() as stack, cwg.Guard(settings.with_overrides(grace=0), [reporter]) as guard:
        for _ in range(10):
            stack.enter_context(half_closed_pair())
        time.sleep(0.05)
        [alert] = guard.report().alerts
        assert alert.kind is cwg.AlertKind.COUNT


def quiet_reporter(at):
    """A reporter for people, and what it has written: whole reports, or that there is no news."""
    written = []
    quiet = Quiet(
        "text",
        lambda report: written.append(len(report.findings)),
        lambda report: written.append("no news"),
        lambda: at[0],
    )
    return quiet, written


def test_of_a_series_only_changes_are_written_and_now_and_then_that_there_are_none():
    at = [0.0]
    quiet, written = quiet_reporter(at)
    clean = report_leaks(lambda report: None, count=1)
    leaky, clean = clean, replace(clean, findings=())
    for report in (clean, clean, leaky, leaky, leaky):
        quiet.periodic(report, 3600)
        at[0] += 60
    assert written == ["no news", 1]
    at[0] += 3600
    quiet.periodic(leaky, 3600)
    quiet.periodic(leaky, 3600)
    assert written == ["no news", 1, "no news"]


def test_without_a_heartbeat_every_report_of_a_series_is_written():
    quiet, written = quiet_reporter([0.0])
    leaky = report_leaks(lambda report: None)
    for _ in range(3):
        quiet.periodic(leaky, 0)
    assert written == [1, 1, 1]


def test_a_report_that_was_asked_for_is_written_though_nothing_has_changed():
    stream = io.StringIO()
    with leaking_guard(reporters.text(stream)) as guard:
        guard.report()
        guard.report()
    assert stream.getvalue().count("1 leaked socket from 1 place") == 2


def test_a_monitor_writes_what_has_changed_and_at_its_end_everything():
    stream = io.StringIO()
    with leaking_guard(reporters.text(stream)) as guard:
        seen = CapturingReporter()
        guard._add_reporters([seen])
        with cwg.Monitor(guard, interval=0.1, at_exit=True):
            deadline = time.monotonic() + 20
            while len(seen.reports) < 4 and time.monotonic() < deadline:
                time.sleep(0.05)
        assert len(seen.reports) >= 4
    assert stream.getvalue().count("1 leaked socket from 1 place") == 2
