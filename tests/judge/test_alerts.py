"""The alerts of a series of reports: each is reported when it begins, changes and ends."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import closewait_guard as cwg
import strategies
from closewait_guard._inspect import SiteCount
from closewait_guard._judge import judge
from closewait_guard._judge.alerts import (
    AlertState,
    SeriesPoint,
    threshold_alerts,
    update_alerts,
)
from closewait_guard.model import SCHEMA

# Of which alerts there may be several, and what each is about.
SUBJECTS = {"growth": "site", "churn": "site", "pool_exhausted": "pool"}
CLOSE_WAIT, LISTEN = cwg.State.CLOSE_WAIT, cwg.State.LISTEN


def frame(site):
    return cwg.Frame("/app/shop.py", 1, site, "shop", cwg.FrameKind.USER)


def leak(
    serial,
    site="fetch",
    age=1.0,
    verdict=cwg.Verdict.LEAKED,
    state=CLOSE_WAIT,
    evidence=cwg.Evidence.TCP_INFO,
):
    stack = (frame(site),) if site else ()
    record = cwg.SocketRecord(
        serial, 1, 0.0, "MainThread", None, (), {}, cwg.Origin.CREATED, None, stack
    )
    seen = cwg.Observation(
        record,
        fd=serial,
        inode=serial,
        family="AF_INET",
        type="SOCK_STREAM",
        local=None,
        peer=None,
        state=state,
        evidence=evidence,
        peer_closed_for=age,
        unread=0,
        last_sent_for=None,
        last_received_for=None,
        tls=False,
        close_called=False,
        connection=cwg.Connection.PEER_CLOSED,
        suspect_for=age,
    )
    return cwg.Finding(seen, verdict, cwg.Severity.INFO, (), "")


def report_of(findings=(), *, fd_used=10, fd_limit=1_000_000):
    return cwg.Report(
        schema=SCHEMA,
        taken_at=0.0,
        host="here",
        pid=1,
        command="",
        python="",
        open_sockets=len(findings),
        fd_used=fd_used,
        fd_limit=fd_limit,
        coverage=cwg.Coverage(0, 0, 0, 0, 0, ()),
        findings=tuple(findings),
    )


def leaking(count, first=0, **options):
    return [leak(first + number, **options) for number in range(count)]


class AlertSeries:
    """A series of reports, and its alerts."""

    def __init__(self, interval=60.0, **settings):
        self.settings = cwg.Settings(**settings)
        self.interval = interval
        self.state, self.at = AlertState(), 0.0
        self.alerts, self.closed = [], ()

    def next(self, report, *, populations=None, exhausted=0, still_open=()):
        point = SeriesPoint(self.at, report, populations or {}, exhausted, frozenset(still_open))
        self.state, alerts, self.closed = update_alerts(self.state, point, self.settings)
        self.at += self.interval
        self.alerts += alerts
        return [(alert.kind.value, alert.status.value) for alert in alerts]

    def of(self, kind):
        return [alert for alert in self.alerts if alert.kind == kind]


# Thresholds.


def test_count_is_raised_above_its_limit_and_resolved_well_below_it():
    series = AlertSeries(age_warning=1e6, age_critical=1e6)
    assert series.next(report_of(leaking(100))) == []
    assert series.next(report_of(leaking(101))) == [("count", "raised")]
    assert [series.next(report_of(leaking(count))) for count in (99, 150, 91, 100, 201)] == [[]] * 5
    assert series.next(report_of(leaking(202))) == [("count", "changed")]
    assert series.next(report_of(leaking(90))) == [("count", "resolved")]
    assert series.next(report_of(leaking(100))) == []
    raised = series.of("count")[0]
    assert raised.severity is cwg.Severity.WARNING
    assert raised.message == "101 sockets in CLOSE_WAIT, more than 100"
    assert raised.data == {"count": 101, "limit": 100}


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(91, 199), min_size=1, max_size=12))
def test_a_count_that_swings_about_its_limit_is_reported_once(counts):
    series = AlertSeries()
    series.next(report_of(leaking(101)))
    assert [series.next(report_of(leaking(count))) for count in counts] == [[]] * len(counts)


def test_what_was_dropped_in_close_wait_is_closed_and_does_not_count():
    series = AlertSeries(count_warning=1, age_warning=1)
    dropped = leaking(5, age=9.0, verdict=cwg.Verdict.DROPPED, evidence=cwg.Evidence.FINALIZED)
    assert series.next(report_of(dropped, fd_used=1, fd_limit=8)) == []
    found = judge([each.observation for each in dropped], series.settings, fd_limit=8)
    assert {each.severity for each in found} == {cwg.Severity.WARNING}


def test_only_sockets_in_close_wait_count():
    series = AlertSeries(count_warning=1)
    assert series.next(report_of(leaking(5, state=LISTEN, verdict=cwg.Verdict.DEAD))) == []
    assert series.next(report_of(leaking(5, verdict=cwg.Verdict.HALF_CLOSED))) == [
        ("count", "raised")
    ]


@pytest.mark.parametrize(
    ("waiting", "used", "is_raised"),
    [(50, 60, False), (51, 60, True), (0, 80, False), (0, 81, True)],
)
def test_fd_limit_is_critical_by_half_in_close_wait_or_most_in_use(waiting, used, is_raised):
    series = AlertSeries()
    report = report_of(leaking(waiting), fd_used=used, fd_limit=100)
    assert series.next(report) == ([("fd_limit", "raised")] if is_raised else [])
    if is_raised:
        [alert] = series.alerts
        assert alert.severity is cwg.Severity.CRITICAL
        assert f"{used} of 100 descriptors are in use ({used}%), {waiting} of" in alert.message


def test_fd_limit_is_resolved_well_below_its_limit():
    series = AlertSeries()
    steps = [
        series.next(report_of(fd_used=used, fd_limit=100)) for used in (81, 79, 73, 72, 79, 81)
    ]
    assert steps == [
        [("fd_limit", "raised")],
        [],
        [],
        [("fd_limit", "resolved")],
        [],
        [("fd_limit", "raised")],
    ]


@pytest.mark.parametrize(("fd_used", "fd_limit"), [(None, None), (500, None), (None, 0)])
def test_without_a_limit_there_is_no_alert(fd_used, fd_limit):
    assert AlertSeries().next(report_of(leaking(90), fd_used=fd_used, fd_limit=fd_limit)) == []


def test_descriptors_that_cannot_be_counted_are_not_reported_as_none():
    series = AlertSeries()
    series.next(report_of(leaking(90), fd_used=None, fd_limit=100))
    [alert] = series.of("fd_limit")
    assert alert.message == "the limit is 100 descriptors, 90 of them in CLOSE_WAIT"
    assert alert.data["fd_used"] is None


def test_age_is_a_warning_after_five_minutes_and_critical_after_thirty():
    series = AlertSeries(interval=300)
    ages = [299, 300, 301, 900, 1800, 1801, 2500]
    steps = [series.next(report_of([leak(1, age=age)])) for age in ages]
    assert steps == [[], [], [("age", "raised")], [], [], [("age", "changed")], []]
    assert [alert.severity.value for alert in series.alerts] == ["warning", "critical"]
    assert series.alerts[0].data == {"count": 1, "oldest_s": 301, "site": "/app/shop.py:1"}
    assert "1 socket in CLOSE_WAIT for more than 30 min" in series.alerts[1].message
    assert series.next(report_of()) == [("age", "resolved")]


def test_age_is_reported_again_when_twice_as_many_are_old():
    series = AlertSeries()
    steps = [series.next(report_of(leaking(count, age=400))) for count in (2, 3, 4, 7)]
    assert steps == [[("age", "raised")], [], [("age", "changed")], []]


def test_age_ignores_findings_that_are_no_leaks():
    assert AlertSeries().next(report_of([leak(1, age=1e5, verdict=cwg.Verdict.HALF_CLOSED)])) == []


@pytest.mark.parametrize(
    ("settings", "report"),
    [
        ({"count_warning": 3}, report_of(leaking(4))),
        ({"fd_share_critical": 0.01}, report_of(leaking(4), fd_limit=100)),
        ({"fd_used_critical": 0.05}, report_of(fd_used=10, fd_limit=100)),
        ({"age_warning": 0.5}, report_of([leak(1)])),
        ({"age_warning": 0.5, "age_critical": 0.5}, report_of([leak(1)])),
    ],
)
def test_every_limit_can_be_set(settings, report):
    assert AlertSeries().next(report) == []
    assert len(AlertSeries(**settings).next(report)) == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.reports, strategies.settings)
def test_a_report_that_is_no_part_of_a_series_has_the_alerts_of_the_first_of_one(report, chosen):
    report = replace(report, alerts=())
    first = AlertSeries()
    first.settings = chosen
    first.next(report)
    assert tuple(first.alerts) == threshold_alerts(report, chosen)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(strategies.reports, max_size=5), strategies.settings)
def test_every_alert_is_raised_before_it_changes_or_ends_and_never_twice(reports, chosen):
    series, active = AlertSeries(), set()
    series.settings = chosen
    for report in [*reports, *[report_of(fd_limit=None)] * 40]:
        before = len(series.alerts)
        series.next(report)
        for alert in series.alerts[before:]:
            subject = SUBJECTS.get(alert.kind)
            key = (alert.kind, alert.data[subject] if subject else None)
            assert (alert.status == "raised") is (key not in active)
            (active.discard if alert.status == "resolved" else active.add)(key)
    assert not active


# Growth.


def test_full_pools_of_one_name_are_one_alert_about_the_one_that_is_full_for_the_longest():
    pools = [cwg.FullPool("queue", 2, full_for, 60.0, {"shop.py:3": 2}) for full_for in (40, 50, 1)]
    report = replace(report_of(), full_pools=tuple(pools))
    (alert,) = threshold_alerts(report, cwg.Settings())
    assert alert.data["full_for_s"] == 50
    assert alert.message.endswith("; 1 other pool of that name likewise")


def grow(series, counts, site="fetch", **options):
    """The alerts of kind growth, with the number of the report."""
    steps = {}
    for number, count in enumerate(counts):
        for kind, status in series.next(report_of(leaking(count, site=site), **options)):
            if kind == "growth":
                steps[number] = status
    return steps


@pytest.fixture
def make_series():
    return lambda **settings: AlertSeries(
        **{"count_warning": 10**9, "age_warning": 1e9, "age_critical": 1e9, **settings}
    )


def test_growth_is_raised_once_changed_when_it_doubles_and_resolved_when_it_is_closed(make_series):
    series = make_series()
    assert grow(series, [*range(1, 101), *[0] * 5]) == {
        30: "raised",
        61: "changed",
        100: "resolved",
    }
    raised, changed, resolved = series.alerts
    assert raised.data["site"] == "/app/shop.py:1 in fetch()"
    assert raised.data["count"] == 31
    assert raised.data["per_minute"] == 1.0
    assert "of /app/shop.py:1 in fetch() keep growing: 31 now, 29 more than 29 min ago" in str(
        raised
    )
    assert resolved.kind == "growth"


def test_growth_that_stops_is_resolved_after_a_while_though_nothing_is_closed(make_series):
    steps = grow(make_series(), [*range(50), *[50] * 60])
    assert list(steps.values()) == ["raised", "resolved"]
    assert 50 < max(steps) < 75


def test_growth_that_noise_hides_for_a_moment_is_reported_once(make_series):
    chance = random.Random(5)
    counts = [number // 2 + chance.randint(0, 3) for number in range(150)]
    steps = list(grow(make_series(), counts).values())
    assert steps.count("raised") == 1
    assert "resolved" not in steps


def test_growth_says_when_the_limit_will_be_reached_and_is_critical_if_that_is_soon(make_series):
    series = make_series()
    grow(series, range(40), fd_used=400, fd_limit=1000)
    [far] = series.of("growth")
    assert far.data["limit_reached_in_s"] == 600 * 60
    assert "at this rate the descriptor limit is reached in 10 h" in far.message
    assert far.severity is cwg.Severity.WARNING
    series = make_series()
    grow(series, range(40), fd_used=970, fd_limit=1000)
    [near] = series.of("growth")
    assert near.data["limit_reached_in_s"] == 30 * 60
    assert near.severity is cwg.Severity.CRITICAL


def descriptors(counted_for=0.0, **by_kind):
    return cwg.Descriptors(sum(by_kind.values()), by_kind, {}, counted_for)


def with_kinds(series, reports):
    return [series.next(replace(report_of(), descriptors=found)) for found in reports]


def test_a_kind_of_descriptors_that_keeps_growing_is_raised_and_resolved(make_series):
    series = make_series()
    counts = [*range(10, 110), *[3] * 10]
    with_kinds(series, [descriptors(epoll=count, file=5, socket=count) for count in counts])
    raised, changed, resolved = series.of("growth")
    assert [each.status.value for each in series.alerts] == ["raised", "changed", "resolved"]
    assert raised.data["descriptor_kind"] == changed.data["descriptor_kind"] == "epoll"
    assert raised.data["site"] is None
    assert raised.message.startswith("descriptors of kind epoll keep growing: 40 now, 29 more than")
    assert resolved.message == "descriptors of kind epoll no longer increase: 3 now"


def test_few_more_descriptors_and_those_that_level_off_raise_nothing(make_series):
    for counts in ([10 + number // 8 for number in range(70)], [*range(20), *[20] * 100]):
        series = make_series()
        with_kinds(series, [descriptors(file=count) for count in counts])
        assert series.alerts == []


def test_descriptors_that_were_not_counted_end_no_growth(make_series):
    series = make_series()
    with_kinds(series, [descriptors(pipe=count) for count in range(10, 50)])
    with_kinds(series, [None] * 3)
    assert [each.status.value for each in series.alerts] == ["raised"]


def test_growth_of_a_kind_hides_no_growth_of_leaks_in_total(make_series):
    series = make_series()
    for number in range(40):
        leaks = [leak(each, site="") for each in range(number)]
        found = descriptors(file=10 + number)
        series.next(replace(report_of(leaks), descriptors=found))
    assert [each.data.get("descriptor_kind") for each in series.of("growth")] == ["file", None]


def test_growth_without_a_limit_projects_nothing(make_series):
    series = make_series()
    grow(series, range(40), fd_limit=None)
    [alert] = series.of("growth")
    assert alert.data["limit_reached_in_s"] is None
    assert "limit" not in alert.message


def test_growth_of_several_sites_is_reported_by_site_and_not_in_total(make_series):
    series = make_series()
    for number in range(40):
        fetch, query = leaking(number), leaking(2 * number, first=1000, site="query")
        series.next(report_of(fetch + query))
    assert {alert.data["site"] for alert in series.alerts} == {
        "/app/shop.py:1 in fetch()",
        "/app/shop.py:1 in query()",
    }


def test_growth_that_is_spread_over_many_sites_is_reported_in_total(make_series):
    series = make_series()
    for number in range(40):
        series.next(report_of([leak(each, site=f"line{each}") for each in range(number)]))
    [alert] = series.of("growth")
    assert alert.data["site"] is None
    assert "leaked sockets keep growing" in alert.message


def test_growth_of_sockets_without_a_site_is_reported_in_total(make_series):
    series = make_series()
    grow(series, range(40), site=None)
    assert [alert.data["site"] for alert in series.of("growth")] == [None]


def test_findings_that_are_no_leaks_do_not_grow(make_series):
    series = make_series()
    for number in range(60):
        series.next(report_of(leaking(number, verdict=cwg.Verdict.HALF_CLOSED)))
    assert series.alerts == []


def test_a_site_that_has_had_no_leak_for_a_window_is_forgotten(make_series):
    series = make_series()
    for number in range(200):
        series.next(report_of([leak(number, site=f"line{number}")]))
        assert len(series.state.leaked) <= 32
    for _ in range(31):
        series.next(report_of())
    assert series.state.leaked == series.state.opened == series.state.active == {}


def test_a_window_of_zero_remembers_and_reports_nothing(make_series):
    series = make_series(growth_window=0)
    for number in range(100):
        populations = {"site": SiteCount(number, number)}
        series.next(report_of(leaking(number)), populations=populations)
    assert series.alerts == []
    assert series.state.leaked == series.state.opened == {}


# Churn.


def churn(series, populations, findings=None):
    for number, (now, old) in enumerate(populations):
        report = report_of(findings(number) if findings else ())
        series.next(report, populations={"/app/pool.py:7 in grow()": SiteCount(now, old)})
    return [alert.status.value for alert in series.of("churn")]


def test_sockets_that_are_made_and_stay_churn(make_series):
    series = make_series()
    assert churn(series, [(number, max(0, number - 14)) for number in range(60)])[0] == "raised"
    alert = series.of("churn")[0]
    assert alert.data["site"] == "/app/pool.py:7 in grow()"
    assert alert.data["count"] == 31
    assert "made faster than they are closed: 31 are open, 29 more than 29 min" in alert.message


def test_many_short_connections_do_not_churn(make_series):
    assert churn(make_series(), [(number, number // 20) for number in range(60)]) == []


def test_a_pool_that_is_full_does_not_churn(make_series):
    assert (
        churn(
            make_series(), [(min(number, 20), max(0, min(number, 20) - 14)) for number in range(90)]
        )
        == []
    )


def test_few_sockets_do_not_churn(make_series):
    assert churn(make_series(), [(number // 5, number // 5) for number in range(45)]) == []


def test_what_grows_as_a_leak_is_not_reported_as_churn_too(make_series):
    series = make_series()
    site = "/app/shop.py:1 in fetch()"
    for number in range(40):
        series.next(report_of(leaking(number)), populations={site: SiteCount(number, number)})
    assert {alert.kind for alert in series.alerts} == {"growth"}


def test_sockets_that_leak_a_while_after_they_were_opened_are_no_churn(make_series):
    """Their peers close them at once, and a report counts them when the grace time is over."""
    series = make_series()
    site = "/app/shop.py:1 in fetch()"
    for number in range(60):
        leaks = leaking(max(0, number - 3))
        series.next(report_of(leaks), populations={site: SiteCount(number, number - 14)})
    # What is closed during a scan may have been counted before.
    series.next(report_of(), populations={site: SiteCount(60, 46)})
    series.next(report_of(), populations={site: SiteCount(0, 0)})
    assert [(alert.kind.value, alert.status.value) for alert in series.alerts] == [
        ("growth", "raised"),
        ("growth", "resolved"),
    ]


def test_an_alert_that_is_over_says_what_is_so_now(make_series):
    series = make_series(count_warning=20, age_warning=10, fd_used_critical=0.5)
    site = "/app/shop.py:1 in fetch()"
    for number in range(40):
        report = report_of(leaking(number, age=11.0), fd_used=60 + number, fd_limit=100)
        series.next(report, populations={site: SiteCount(number, number)}, exhausted=number)
    for _ in range(2):
        series.next(report_of(leaking(3)), populations={site: SiteCount(3, 3)}, exhausted=39)
    over = {each.kind.value: each for each in series.alerts if each.status == "resolved"}
    assert {kind: alert.message for kind, alert in over.items()} == {
        "count": "sockets are back below the limit of the alert: 3 in CLOSE_WAIT",
        "age": "no socket is in CLOSE_WAIT for so long any more: 3 in CLOSE_WAIT",
        "fd_limit": "file descriptors are back below the limit of the alert: 3 in CLOSE_WAIT",
        "fd_exhausted": "file descriptors are available again",
        "growth": f"leaked sockets of {site} no longer increase: 3 now",
    }
    assert over["fd_limit"].data["fd_used"] == 10
    assert {kind: alert.data["count"] for kind, alert in over.items()} == {
        **dict.fromkeys(over, 3),
        "fd_exhausted": 0,
    }


def test_churn_that_is_over_says_what_has_leaked(make_series):
    series = make_series()
    site = "/app/shop.py:1 in fetch()"
    for number in range(50):
        series.next(report_of(), populations={site: SiteCount(number, number)})
    series.next(report_of(leaking(40)), populations={site: SiteCount(49, 49)})
    message = f"open sockets of {site} no longer increase: 9 now, and 40 leaked"
    assert series.of("churn")[-1].message == message


def test_churn_is_resolved_when_the_sockets_are_closed(make_series):
    counts = [*range(40), *[0] * 3]
    assert churn(make_series(), [(count, count) for count in counts]) == ["raised", "resolved"]


# Descriptors that ran out.


def test_fd_exhausted_is_active_for_a_minute_after_the_last_time():
    series = AlertSeries(interval=20)
    times = [0, 3, 3, 3, 3, 3, 3, 4, 4]
    steps = [series.next(report_of(fd_used=100, fd_limit=100), exhausted=each) for each in times]
    kinds = [[status for kind, status in step if kind == "fd_exhausted"] for step in steps]
    assert kinds == [[], ["raised"], [], [], [], ["resolved"], [], ["raised"], []]
    first = series.of("fd_exhausted")[0]
    assert first.severity is cwg.Severity.CRITICAL
    assert first.data == {"count": 3, "fd_used": 100, "fd_limit": 100}
    assert first.message == (
        "no descriptor was left for 3 sockets to be made or accepted; 100 of 100 are in use"
    )


def test_fd_exhausted_is_reported_once_while_it_goes_on():
    series = AlertSeries(interval=20)
    for number in range(1, 30):
        series.next(report_of(), exhausted=number)
    assert [alert.status.value for alert in series.of("fd_exhausted")] == ["raised"]


# What was closed late.


def test_a_leak_that_is_closed_is_reported_with_the_time_it_stayed_open():
    series = AlertSeries(interval=10)
    series.next(report_of([leak(1, age=30.0), leak(2, age=5.0)]))
    series.next(report_of([leak(2, age=15.0)]))
    [closed] = series.closed
    assert (closed.finding.observation.record.serial, closed.after) == (1, 40.0)
    series.next(report_of())
    assert [each.after for each in series.closed] == [25.0]
    series.next(report_of())
    assert series.closed == ()


def test_a_socket_that_is_no_suspect_any_more_but_open_is_not_reported_as_closed():
    series = AlertSeries()
    series.next(report_of([leak(1)]))
    series.next(report_of(), still_open=[1])
    assert series.closed == ()


def test_a_finding_that_is_no_leak_any_more_is_not_reported_as_closed():
    series = AlertSeries()
    series.next(report_of([leak(1)]))
    series.next(report_of([leak(1, verdict=cwg.Verdict.CLOSING)]))
    assert series.closed == ()


@pytest.mark.parametrize("verdict", [cwg.Verdict.DROPPED, cwg.Verdict.UNCLOSED])
def test_what_was_collected_is_never_reported_as_closed(verdict):
    series = AlertSeries()
    gone = leak(1, verdict=verdict)
    seen = replace(gone.observation, evidence=cwg.Evidence.COLLECTED)
    series.next(report_of([replace(gone, observation=seen)]))
    series.next(report_of())
    assert series.closed == ()
