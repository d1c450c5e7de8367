"""Every observation has one verdict, which follows from the observation and settings alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import closewait_guard as cwg
import strategies
from closewait_guard._inspect.observation import (
    SuspectAge,
    peer_closed_for,
    suspect_for,
    update_age,
)
from closewait_guard._inspect.probe import ProbeResult
from closewait_guard._judge.hints import HINTS, hint_for
from closewait_guard._judge.verdict import judge, verdict_of

RECORD = cwg.SocketRecord(1, 1, 0.0, "t", None, (), {}, cwg.Origin.CREATED, None, ())
LEAKED = cwg.Observation(
    record=RECORD,
    fd=3,
    inode=1,
    family="AF_INET",
    type="SOCK_STREAM",
    local="127.0.0.1:1",
    peer="127.0.0.1:2",
    state=cwg.State.CLOSE_WAIT,
    evidence=cwg.Evidence.TCP_INFO,
    peer_closed_for=10.0,
    unread=0,
    last_sent_for=5000.0,
    last_received_for=10.0,
    tls=False,
    close_called=False,
    connection=cwg.Connection.PEER_CLOSED,
    suspect_for=10.0,
    unsent=0,
)
SETTINGS = cwg.Settings()


def judged(count=1, limit=20_000, settings=SETTINGS, **changes):
    return judge([replace(LEAKED, **changes)] * count, settings, limit)[0]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, cwg.Verdict.LEAKED),
        ({"suspect_for": 0.9}, cwg.Verdict.CLOSING),
        ({"suspect_for": 1.0}, cwg.Verdict.LEAKED),
        ({"last_sent_for": 1.0}, cwg.Verdict.HALF_CLOSED),
        ({"last_sent_for": 9.99}, cwg.Verdict.LEAKED),
        ({"last_sent_for": None}, cwg.Verdict.LEAKED),
        ({"last_sent_for": 40.0, "peer_closed_for": 90.0}, cwg.Verdict.LEAKED),
        ({"unsent": 5}, cwg.Verdict.HALF_CLOSED),
        ({"connection": cwg.Connection.GONE, "state": cwg.State.CLOSE}, cwg.Verdict.DEAD),
        ({"connection": cwg.Connection.UNCONNECTED}, cwg.Verdict.DEAD),
        ({"connection": cwg.Connection.UNCONNECTED, "suspect_for": 0.1}, cwg.Verdict.OPEN),
        ({"connection": cwg.Connection.NEVER_CONNECTED}, cwg.Verdict.DEAD),
        ({"connection": cwg.Connection.NEVER_CONNECTED, "suspect_for": 0.1}, cwg.Verdict.OPEN),
        ({"connection": cwg.Connection.NOT_APPLICABLE}, cwg.Verdict.OPEN),
        ({"connection": cwg.Connection.LIVE}, cwg.Verdict.OPEN),
        (
            {"connection": cwg.Connection.LIVE, "state": cwg.State.FIN_WAIT2},
            cwg.Verdict.CLOSING,
        ),
        ({"close_called": True}, cwg.Verdict.LINGERING),
        ({"close_called": True, "in_use": True}, cwg.Verdict.OPEN),
        ({"close_called": True, "connection": cwg.Connection.LIVE}, cwg.Verdict.LINGERING),
        ({"close_called": True, "suspect_for": 0.5}, cwg.Verdict.CLOSING),
        ({"evidence": cwg.Evidence.FINALIZED}, cwg.Verdict.DROPPED),
        (
            {"evidence": cwg.Evidence.COLLECTED, "connection": cwg.Connection.LIVE},
            cwg.Verdict.DROPPED,
        ),
        ({"record": replace(RECORD, origin=cwg.Origin.INHERITED)}, cwg.Verdict.INHERITED),
    ],
)
def test_the_verdicts_of_the_contract(changes, verdict):
    assert judged(**changes).verdict is verdict


def test_the_first_seven_verdicts_are_leaks():
    assert [verdict for verdict in cwg.Verdict if verdict.is_leak] == [
        "leaked",
        "dead",
        "dropped",
        "lingering",
        "inherited",
        "unclosed",
        "surplus",
    ]


@pytest.mark.parametrize(
    ("given", "severity"),
    [
        ({}, "warning"),
        ({"count": 101}, "warning"),
        ({"count": 50, "limit": 100}, "warning"),
        ({"count": 51, "limit": 100}, "critical"),
        ({"count": 101, "limit": None}, "warning"),
        ({"peer_closed_for": 1800.0}, "warning"),
        ({"peer_closed_for": 1801.0}, "critical"),
        ({"evidence": cwg.Evidence.FINALIZED}, "warning"),
        ({"suspect_for": 0.1, "count": 500}, "info"),
    ],
)
def test_severity_by_the_default_thresholds(given, severity):
    assert judged(**given).severity == severity


def test_thresholds_can_be_set():
    settings = cwg.Settings(count_warning=0, age_critical=5)
    assert judged(settings=settings).severity is cwg.Severity.CRITICAL
    assert judged(settings=cwg.Settings(count_warning=0)).severity is cwg.Severity.WARNING


@given(strategies.observations, strategies.settings)
def test_only_a_connection_that_was_given_time_is_a_leak(seen, settings):
    verdict = verdict_of(seen, settings)
    if verdict.is_leak and verdict is not cwg.Verdict.DROPPED:
        assert seen.connection is not cwg.Connection.NOT_APPLICABLE
        assert seen.suspect_for >= settings.grace
        assert not seen.in_use or not seen.close_called


@given(strategies.observations, strategies.settings, strategies.seconds)
def test_more_grace_never_gives_more_leaks(seen, settings, extra):
    patient = settings.with_overrides(grace=settings.grace + extra)
    if verdict_of(seen, patient).is_leak:
        assert verdict_of(seen, settings).is_leak


@given(st.lists(strategies.observations, max_size=5), strategies.settings, st.none() | st.just(3))
def test_every_observation_gets_one_verdict_and_a_hint(seen, settings, limit):
    leaks = judge(seen, settings, limit)
    assert [leak.observation for leak in leaks] == seen
    for leak in leaks:
        seen = leak.observation
        assert hint_for(leak.verdict, seen.record.origin, seen.evidence, seen.connection)
        assert leak.is_leak == leak.verdict.is_leak
        is_explained = leak.verdict in (
            cwg.Verdict.CLOSED_ELSEWHERE,
            cwg.Verdict.STALE_POOL,
            cwg.Verdict.UNANSWERED,
        )
        if leak.is_leak:
            assert leak.severity is not cwg.Severity.INFO
        else:
            assert is_explained or leak.severity is cwg.Severity.INFO


def test_every_hint_can_be_reached():
    for row in HINTS:
        origin = row.origin or cwg.Origin.CREATED
        evidence = row.evidence or cwg.Evidence.TCP_INFO
        connection = row.connection or cwg.Connection.PEER_CLOSED
        hint = hint_for(row.verdict, origin, evidence, connection, is_replaced=row.is_replaced)
        assert hint == row.text()


def test_every_verdict_has_a_hint_for_every_origin():
    for verdict in set(cwg.Verdict) - {cwg.Verdict.STALE_POOL}:
        for origin in cwg.Origin:
            for connection in cwg.Connection:
                assert hint_for(verdict, origin, cwg.Evidence.TCP_INFO, connection)


# How long a socket has been a suspect.

connections = st.sampled_from(cwg.Connection)
views = st.builds(
    ProbeResult,
    state=st.just(cwg.State.NONE),
    evidence=st.just(cwg.Evidence.POLL),
    connection=connections,
    fin_for=strategies.maybe_seconds,
    unread=st.none() | st.integers(0, 5),
    unsent=st.none(),
    last_sent_for=strategies.maybe_seconds,
    last_received_for=strategies.maybe_seconds,
)


def looks(views, close_called, at_most):
    """The ages at successive observations, a second apart."""
    age = None
    for now, view in enumerate(views, start=10**7):
        age = update_age(view, close_called, age, at_most, float(now))
        yield view, age, float(now)


@given(st.lists(views, min_size=1, max_size=6), st.booleans(), strategies.seconds)
def test_times_are_never_negative_and_suspicion_is_never_older_than_the_end(many, closed, at_most):
    for view, age, now in looks(many, closed, at_most):
        suspect, ended = suspect_for(view, age, now), peer_closed_for(view, age, now)
        assert suspect is None or suspect >= 0
        assert ended is None or ended >= 0
        assert (ended is None) or view.connection is cwg.Connection.PEER_CLOSED
        if view.connection is cwg.Connection.NOT_APPLICABLE:
            assert suspect is None
        if view.connection is cwg.Connection.LIVE and not closed:
            assert suspect is None


@given(views, st.integers(1, 5), strategies.seconds)
def test_an_end_that_stays_the_same_grows_older_with_each_observation(view, times, at_most):
    ages = [suspect_for(view, age, now) for _, age, now in looks([view] * times, False, at_most)]
    if ages[0] is not None:
        assert all(later >= earlier for earlier, later in zip(ages, ages[1:], strict=False))


def test_a_date_that_is_a_few_milliseconds_off_is_no_change():
    seen = cwg.State.CLOSE_WAIT, cwg.Evidence.TCP_INFO, cwg.Connection.PEER_CLOSED
    view = ProbeResult(*seen, fin_for=50.0, unread=0)
    first = update_age(view, False, None, 0.0, 1000.0)
    assert update_age(view._replace(fin_for=60.004), False, first, 0.0, 1010.0) is first
    earlier = update_age(view._replace(fin_for=60.1), False, first, 0.0, 1010.0)
    assert earlier.since == pytest.approx(949.9)


@given(views.filter(lambda view: view.connection is cwg.Connection.PEER_CLOSED))
def test_our_own_sending_does_not_make_the_fin_look_younger(view):
    first = update_age(view._replace(fin_for=50.0), False, None, 0.0, 1000.0)
    again = view._replace(fin_for=0.1)
    second = update_age(again, False, first, 0.0, 1010.0)
    assert peer_closed_for(again, second, 1010.0) == pytest.approx(60.0)


@given(views)
@example(ProbeResult(cwg.State.NONE, cwg.Evidence.POLL, cwg.Connection.GONE))
def test_unread_data_going_down_restarts_the_clock(view):
    view = view._replace(connection=cwg.Connection.PEER_CLOSED, fin_for=None, unread=9)
    before = update_age(view, False, None, 100.0, 1000.0)
    assert suspect_for(view, before, 1000.0) == 100.0
    reading = view._replace(unread=3)
    after = update_age(reading, False, before, 0.0, 1001.0)
    assert suspect_for(reading, after, 1001.0) == 0.0
    assert isinstance(after, SuspectAge)


def test_an_end_first_seen_by_an_earlier_observation_counts_from_then():
    view = ProbeResult(cwg.State.CLOSE, cwg.Evidence.POLL, cwg.Connection.GONE)
    live = view._replace(connection=cwg.Connection.LIVE)
    before = update_age(live, True, None, 500.0, 1000.0)
    after = update_age(view, True, before, 500.0, 1002.0)
    assert suspect_for(view, after, 1002.0) == 0.0
