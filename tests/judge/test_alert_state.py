"""A series of reports in, alerts out, each told when it begins, changes and ends: pure."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import closewait_guard as cwg
import strategies
from closewait_guard._inspect import SiteCount
from closewait_guard._judge.alert_state import AlertState, SeriesPoint, update_alerts
from closewait_guard._judge.alerts import threshold_alerts
from closewait_guard.model import SCHEMA

CLOSE_WAIT, LISTEN = cwg.State.CLOSE_WAIT, cwg.State.LISTEN


def frame(site):
    return cwg.Frame("/app/shop.py", 1, site, "shop", cwg.FrameKind.USER)


def leak(serial, site="fetch", age=1.0, verdict=cwg.Verdict.LEAKED, state=CLOSE_WAIT):
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
        evidence=cwg.Evidence.TCP_INFO,
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


class Told:
    """A series, and what it tells."""

    def __init__(self, interval=60.0, **settings):
        self.settings = cwg.Settings(**settings)
        self.interval = interval
        self.trend, self.at = AlertState(), 0.0
        self.alerts, self.closed = [], ()

    def next(self, report, *, populations=None, exhausted=0, still_open=()):
        moment = SeriesPoint(self.at, report, populations or {}, exhausted, frozenset(still_open))
        self.trend, alerts, self.closed = update_alerts(self.trend, moment, self.settings)
        self.at += self.interval
        self.alerts += alerts
        return [(alert.kind.value, alert.status.value) for alert in alerts]

    def of(self, kind):
        return [alert for alert in self.alerts if alert.kind == kind]


# Thresholds.


def test_count_is_raised_above_its_limit_and_resolved_well_below_it():
    told = Told(age_warning=1e6, age_critical=1e6)
    assert told.next(report_of(leaking(100))) == []
    assert told.next(report_of(leaking(101))) == [("count", "raised")]
    assert [told.next(report_of(leaking(count))) for count in (99, 150, 91, 100, 201)] == [[]] * 5
    assert told.next(report_of(leaking(202))) == [("count", "changed")]
    assert told.next(report_of(leaking(90))) == [("count", "resolved")]
    assert told.next(report_of(leaking(100))) == []
    raised = told.of("count")[0]
    assert raised.severity is cwg.Severity.WARNING
    assert raised.message == "101 sockets in CLOSE_WAIT, more than 100"
    assert raised.data == {"count": 101, "limit": 100}


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(91, 199), min_size=1, max_size=12))
def test_a_count_that_swings_about_its_limit_is_told_once(counts):
    told = Told()
    told.next(report_of(leaking(101)))
    assert [told.next(report_of(leaking(count))) for count in counts] == [[]] * len(counts)


def test_only_sockets_in_close_wait_count():
    told = Told(count_warning=1)
    assert told.next(report_of(leaking(5, state=LISTEN, verdict=cwg.Verdict.DEAD))) == []
    assert told.next(report_of(leaking(5, verdict=cwg.Verdict.HALF_CLOSED))) == [
        ("count", "raised")
    ]


@pytest.mark.parametrize(
    ("waiting", "used", "is_raised"),
    [(50, 60, False), (51, 60, True), (0, 80, False), (0, 81, True)],
)
def test_fd_limit_is_critical_by_half_in_close_wait_or_most_in_use(waiting, used, is_raised):
    told = Told()
    report = report_of(leaking(waiting), fd_used=used, fd_limit=100)
    assert told.next(report) == ([("fd_limit", "raised")] if is_raised else [])
    if is_raised:
        [alert] = told.alerts
        assert alert.severity is cwg.Severity.CRITICAL
        assert f"{used} of 100 descriptors are in use ({used}%), {waiting} of" in alert.message


def test_fd_limit_is_resolved_well_below_its_limit():
    told = Told()
    steps = [told.next(report_of(fd_used=used, fd_limit=100)) for used in (81, 79, 73, 72, 79, 81)]
    assert steps == [
        [("fd_limit", "raised")],
        [],
        [],
        [("fd_limit", "resolved")],
        [],
        [("fd_limit", "raised")],
    ]


@pytest.mark.parametrize(("fd_used", "fd_limit"), [(None, None), (500, None), (None, 0)])
def test_without_a_limit_there_is_none_to_cross(fd_used, fd_limit):
    assert Told().next(report_of(leaking(90), fd_used=fd_used, fd_limit=fd_limit)) == []


def test_descriptors_that_nobody_can_count_are_not_told_as_none():
    told = Told()
    told.next(report_of(leaking(90), fd_used=None, fd_limit=100))
    [alert] = told.of("fd_limit")
    assert alert.message == "the limit is 100 descriptors, 90 of them in CLOSE_WAIT"
    assert alert.data["fd_used"] is None


def test_age_is_a_warning_after_five_minutes_and_critical_after_thirty():
    told = Told(interval=300)
    ages = [299, 300, 301, 900, 1800, 1801, 2500]
    steps = [told.next(report_of([leak(1, age=age)])) for age in ages]
    assert steps == [[], [], [("age", "raised")], [], [], [("age", "changed")], []]
    assert [alert.severity.value for alert in told.alerts] == ["warning", "critical"]
    assert told.alerts[0].data == {"count": 1, "oldest_s": 301, "site": "/app/shop.py:1"}
    assert "1 socket in CLOSE_WAIT for more than 30 min" in told.alerts[1].message
    assert told.next(report_of()) == [("age", "resolved")]


def test_age_is_told_again_when_twice_as_many_are_old():
    told = Told()
    steps = [told.next(report_of(leaking(count, age=400))) for count in (2, 3, 4, 7)]
    assert steps == [[("age", "raised")], [], [("age", "changed")], []]


def test_age_does_not_accuse_what_is_explained():
    assert Told().next(report_of([leak(1, age=1e5, verdict=cwg.Verdict.HALF_CLOSED)])) == []


@pytest.mark.parametrize(
    ("settings", "report"),
    [
        ({"count_warning": 3}, report_of(leaking(4))),
        ({"fd_share_critical": 0.01}, report_of(leaking(4), fd_limit=100)),
        ({"fd_used_critical": 0.05}, report_of(fd_used=10, fd_limit=100)),
        ({"age_warning": 0.5}, report_of([leak(1)])),
        ({"age_critical": 0.5}, report_of([leak(1)])),
    ],
)
def test_every_limit_can_be_set(settings, report):
    assert Told().next(report) == []
    assert len(Told(**settings).next(report)) == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.reports, strategies.settings)
def test_a_report_that_is_no_part_of_a_series_has_the_alerts_of_the_first_of_one(report, chosen):
    report = replace(report, alerts=())
    first = Told()
    first.settings = chosen
    first.next(report)
    assert tuple(first.alerts) == threshold_alerts(report, chosen)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(strategies.reports, max_size=5), strategies.settings)
def test_every_alert_is_raised_before_it_changes_or_ends_and_never_twice(reports, chosen):
    told, standing = Told(), set()
    told.settings = chosen
    for report in [*reports, *[report_of(fd_limit=None)] * 40]:
        before = len(told.alerts)
        told.next(report)
        for alert in told.alerts[before:]:
            is_of_site = alert.kind in ("growth", "churn")
            key = (alert.kind, alert.data["site"] if is_of_site else None)
            assert (alert.status == "raised") is (key not in standing)
            (standing.discard if alert.status == "resolved" else standing.add)(key)
    assert not standing


# Growth.


def grow(told, counts, site="fetch", **options):
    """What is told of growth, with the number of the report."""
    steps = {}
    for number, count in enumerate(counts):
        for kind, status in told.next(report_of(leaking(count, site=site), **options)):
            if kind == "growth":
                steps[number] = status
    return steps


@pytest.fixture
def series():
    return lambda **settings: Told(
        **{"count_warning": 10**9, "age_warning": 1e9, "age_critical": 1e9, **settings}
    )


def test_growth_is_raised_once_changed_when_it_doubles_and_resolved_when_it_is_closed(series):
    told = series()
    assert grow(told, [*range(1, 101), *[0] * 5]) == {
        30: "raised",
        61: "changed",
        100: "resolved",
    }
    raised, changed, resolved = told.alerts
    assert raised.data["site"] == "/app/shop.py:1 in fetch()"
    assert raised.data["count"] == 31
    assert raised.data["per_minute"] == 1.0
    assert "of /app/shop.py:1 in fetch() keep growing: 31 now, 29 more than 29 min ago" in str(
        raised
    )
    assert resolved.kind == "growth"


def test_growth_that_stops_is_resolved_after_a_while_though_nothing_is_closed(series):
    steps = grow(series(), [*range(50), *[50] * 60])
    assert list(steps.values()) == ["raised", "resolved"]
    assert 50 < max(steps) < 75


def test_growth_that_noise_hides_for_a_moment_is_told_once(series):
    chance = random.Random(5)
    counts = [number // 2 + chance.randint(0, 3) for number in range(150)]
    steps = list(grow(series(), counts).values())
    assert steps.count("raised") == 1
    assert "resolved" not in steps


def test_growth_tells_when_the_limit_will_be_reached_and_is_critical_if_that_is_soon(series):
    told = series()
    grow(told, range(40), fd_used=400, fd_limit=1000)
    [far] = told.of("growth")
    assert far.data["limit_reached_in_s"] == 600 * 60
    assert "at this rate the descriptor limit is reached in 10 h" in far.message
    assert far.severity is cwg.Severity.WARNING
    told = series()
    grow(told, range(40), fd_used=970, fd_limit=1000)
    [near] = told.of("growth")
    assert near.data["limit_reached_in_s"] == 30 * 60
    assert near.severity is cwg.Severity.CRITICAL


def test_growth_without_a_limit_projects_nothing(series):
    told = series()
    grow(told, range(40), fd_limit=None)
    [alert] = told.of("growth")
    assert alert.data["limit_reached_in_s"] is None
    assert "limit" not in alert.message


def test_growth_of_several_sites_is_told_by_site_and_not_in_total(series):
    told = series()
    for number in range(40):
        fetch, query = leaking(number), leaking(2 * number, first=1000, site="query")
        told.next(report_of(fetch + query))
    assert {alert.data["site"] for alert in told.alerts} == {
        "/app/shop.py:1 in fetch()",
        "/app/shop.py:1 in query()",
    }


def test_growth_that_is_spread_over_many_sites_is_told_in_total(series):
    told = series()
    for number in range(40):
        told.next(report_of([leak(each, site=f"line{each}") for each in range(number)]))
    [alert] = told.of("growth")
    assert alert.data["site"] is None
    assert "leaked sockets keep growing" in alert.message


def test_growth_of_sockets_that_nobody_saw_born_is_told_in_total(series):
    told = series()
    grow(told, range(40), site=None)
    assert [alert.data["site"] for alert in told.of("growth")] == [None]


def test_what_is_explained_does_not_grow(series):
    told = series()
    for number in range(60):
        told.next(report_of(leaking(number, verdict=cwg.Verdict.HALF_CLOSED)))
    assert told.alerts == []


def test_a_site_that_has_had_no_leak_for_a_window_is_forgotten(series):
    told = series()
    for number in range(200):
        told.next(report_of([leak(number, site=f"line{number}")]))
        assert len(told.trend.leaked) <= 32
    for _ in range(31):
        told.next(report_of())
    assert told.trend.leaked == told.trend.opened == told.trend.active == {}


def test_a_window_of_zero_remembers_and_tells_nothing(series):
    told = series(growth_window=0)
    for number in range(100):
        populations = {"site": SiteCount(number, number)}
        told.next(report_of(leaking(number)), populations=populations)
    assert told.alerts == []
    assert told.trend.leaked == told.trend.opened == {}


# Churn.


def churn(told, populations, findings=None):
    for number, (now, old) in enumerate(populations):
        report = report_of(findings(number) if findings else ())
        told.next(report, populations={"/app/pool.py:7 in grow()": SiteCount(now, old)})
    return [alert.status.value for alert in told.of("churn")]


def test_sockets_that_are_made_and_stay_churn(series):
    told = series()
    assert churn(told, [(number, max(0, number - 14)) for number in range(60)])[0] == "raised"
    alert = told.of("churn")[0]
    assert alert.data["site"] == "/app/pool.py:7 in grow()"
    assert alert.data["count"] == 31
    assert "made faster than they are closed: 31 are open, 29 more than 29 min" in alert.message


def test_a_crowd_of_short_connections_does_not_churn(series):
    assert churn(series(), [(number, number // 20) for number in range(60)]) == []


def test_a_pool_that_is_full_does_not_churn(series):
    assert (
        churn(series(), [(min(number, 20), max(0, min(number, 20) - 14)) for number in range(90)])
        == []
    )


def test_few_sockets_do_not_churn(series):
    assert churn(series(), [(number // 5, number // 5) for number in range(45)]) == []


def test_what_grows_as_a_leak_is_not_told_as_churn_too(series):
    told = series()
    site = "/app/shop.py:1 in fetch()"
    for number in range(40):
        told.next(report_of(leaking(number)), populations={site: SiteCount(number, number)})
    assert {alert.kind for alert in told.alerts} == {"growth"}


def test_churn_is_resolved_when_the_sockets_are_closed(series):
    counts = [*range(40), *[0] * 3]
    assert churn(series(), [(count, count) for count in counts]) == ["raised", "resolved"]


# Descriptors that ran out.


def test_fd_exhausted_stands_for_a_minute_after_the_last_time():
    told = Told(interval=20)
    times = [0, 3, 3, 3, 3, 3, 3, 4, 4]
    steps = [told.next(report_of(fd_used=100, fd_limit=100), exhausted=each) for each in times]
    kinds = [[status for kind, status in step if kind == "fd_exhausted"] for step in steps]
    assert kinds == [[], ["raised"], [], [], [], ["resolved"], [], ["raised"], []]
    first = told.of("fd_exhausted")[0]
    assert first.severity is cwg.Severity.CRITICAL
    assert first.data == {"count": 3, "fd_used": 100, "fd_limit": 100}
    assert first.message == (
        "no descriptor was left for 3 sockets to be made or accepted; 100 of 100 are in use"
    )


def test_fd_exhausted_is_told_once_while_it_goes_on():
    told = Told(interval=20)
    for number in range(1, 30):
        told.next(report_of(), exhausted=number)
    assert [alert.status.value for alert in told.of("fd_exhausted")] == ["raised"]


# What was closed late.


def test_what_was_accused_and_is_closed_is_told_with_the_time_it_was_kept():
    told = Told(interval=10)
    told.next(report_of([leak(1, age=30.0), leak(2, age=5.0)]))
    told.next(report_of([leak(2, age=15.0)]))
    [closed] = told.closed
    assert (closed.finding.observation.record.serial, closed.after) == (1, 40.0)
    told.next(report_of())
    assert [each.after for each in told.closed] == [25.0]
    told.next(report_of())
    assert told.closed == ()


def test_what_is_no_suspect_any_more_but_open_is_not_told_as_closed():
    told = Told()
    told.next(report_of([leak(1)]))
    told.next(report_of(), still_open=[1])
    assert told.closed == ()


def test_what_is_explained_now_is_not_told_as_closed():
    told = Told()
    told.next(report_of([leak(1)]))
    told.next(report_of([leak(1, verdict=cwg.Verdict.CLOSING)]))
    assert told.closed == ()


def test_what_was_dropped_was_never_closed():
    told = Told()
    told.next(report_of([leak(1, verdict=cwg.Verdict.DROPPED)]))
    told.next(report_of())
    assert told.closed == ()
