"""Observations and settings in, verdicts out: pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from closewait_guard._hints import hint_for
from closewait_guard.model import (
    Connection,
    Evidence,
    Leak,
    Observation,
    Origin,
    Severity,
    State,
    Verdict,
)
from closewait_guard.settings import Settings

__all__ = ["judge", "verdict_of"]

_ENDING = frozenset(
    {State.FIN_WAIT1, State.FIN_WAIT2, State.CLOSING, State.LAST_ACK, State.TIME_WAIT}
)


# The kernel counts in ticks of up to 10 ms, each of its times by itself.
_TICK = 0.05


class _Thresholds(NamedTuple):
    """What all the sockets of one report are measured by."""

    settings: Settings
    close_wait: int
    fd_limit: int | None


def judge(
    observations: Iterable[Observation], settings: Settings, fd_limit: int | None
) -> tuple[Leak, ...]:
    """Give every observation its verdict, severity and hint.

    Severity rises with the number of sockets in CLOSE_WAIT among all that are given, so give all
    of a report at once.
    """
    everything: Sequence[Observation] = tuple(observations)
    close_wait = sum(observation.state is State.CLOSE_WAIT for observation in everything)
    thresholds = _Thresholds(settings, close_wait, fd_limit)
    return tuple(_leak(observation, thresholds) for observation in everything)


def _leak(observation: Observation, thresholds: _Thresholds) -> Leak:
    verdict = verdict_of(observation, thresholds.settings)
    return Leak(
        observation=observation,
        verdict=verdict,
        severity=_severity(verdict, observation, thresholds),
        holders=(),
        hint=hint_for(verdict, observation),
    )


def verdict_of(observation: Observation, settings: Settings) -> Verdict:
    """What is to be thought of one socket."""
    if observation.evidence in (Evidence.FINALIZED, Evidence.COLLECTED):
        return Verdict.DROPPED
    if observation.connection is Connection.NOT_APPLICABLE:
        return Verdict.OPEN
    if observation.close_called:
        return _verdict_of_closed(observation, settings)
    if observation.connection is Connection.LIVE:
        return Verdict.CLOSING if observation.state in _ENDING else Verdict.OPEN
    if _still_sending(observation, settings):
        return Verdict.HALF_CLOSED
    unconnected = observation.connection is Connection.UNCONNECTED
    if not _late(observation, settings):
        return Verdict.OPEN if unconnected else Verdict.CLOSING
    if observation.record.origin is Origin.INHERITED:
        return Verdict.INHERITED
    peer_closed = observation.connection is Connection.PEER_CLOSED
    return Verdict.LEAKED if peer_closed else Verdict.DEAD


def _verdict_of_closed(observation: Observation, settings: Settings) -> Verdict:
    """`close()` was called: a file object that somebody still reads is in use, others linger."""
    if observation.in_use:
        return Verdict.OPEN
    return Verdict.LINGERING if _late(observation, settings) else Verdict.CLOSING


def _late(observation: Observation, settings: Settings) -> bool:
    return observation.suspect_for is not None and observation.suspect_for >= settings.grace


def _still_sending(observation: Observation, settings: Settings) -> bool:
    """Whether the program has sent since the peer closed its side, and not long ago."""
    if observation.connection is not Connection.PEER_CLOSED:
        return False
    if observation.unsent:
        return True
    sent, closed = observation.last_sent_for, observation.peer_closed_for
    if sent is None or closed is None:
        return False
    after_closing = sent + _TICK < closed
    return after_closing and sent < max(settings.grace, settings.half_close_idle)


def _severity(verdict: Verdict, observation: Observation, thresholds: _Thresholds) -> Severity:
    if not verdict.accused:
        return Severity.INFO
    grades = [_severity_of_age(observation, thresholds.settings)]
    if observation.state is State.CLOSE_WAIT:
        grades.append(_severity_of_count(thresholds))
    if verdict is Verdict.DROPPED:
        # Certain, and it will not grow older: there is nothing to wait for.
        grades.append(Severity.WARNING)
    return max(grades, key=lambda grade: grade.rank)


def _severity_of_age(observation: Observation, settings: Settings) -> Severity:
    age = max(observation.peer_closed_for or 0.0, observation.suspect_for or 0.0)
    if age > settings.age_critical:
        return Severity.CRITICAL
    return Severity.WARNING if age > settings.age_warning else Severity.INFO


def _severity_of_count(thresholds: _Thresholds) -> Severity:
    settings, limit = thresholds.settings, thresholds.fd_limit
    if limit is not None and thresholds.close_wait > limit * settings.fd_share_critical:
        return Severity.CRITICAL
    over = thresholds.close_wait > settings.count_warning
    return Severity.WARNING if over else Severity.INFO
