"""Observations and settings in, verdicts out: pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from closewait_guard._judge.hints import hint_for
from closewait_guard.model import (
    Connection,
    Evidence,
    Finding,
    Observation,
    Origin,
    Severity,
    State,
    Verdict,
)
from closewait_guard.settings import Settings

__all__ = [
    "judge",
    "verdict_of",
]


_ENDING = frozenset(
    {State.FIN_WAIT1, State.FIN_WAIT2, State.CLOSING, State.LAST_ACK, State.TIME_WAIT}
)

_UNCONNECTED = frozenset({Connection.NEVER_CONNECTED, Connection.UNCONNECTED})

_DEALT_WITH_BY_POOLS = frozenset({Verdict.LEAKED, Verdict.DEAD})

# The kernel counts in ticks of up to 10 ms, and two of its times are compared.
_TICK = 0.02


class CloseWaitLoad(NamedTuple):
    """What the number of sockets in CLOSE_WAIT makes of each of them."""

    is_large: bool
    is_critical: bool


def judge(
    observations: Iterable[Observation],
    settings: Settings,
    fd_limit: int | None,
    pooled: Collection[int] = (),
) -> tuple[Finding, ...]:
    """Give every observation its verdict, severity and hint.

    Severity rises with the number of sockets in CLOSE_WAIT among all that are given, so give all
    of a report at once.

    Args:
        observations: What was seen.
        settings: The thresholds.
        fd_limit: How many descriptors the process may have; None if as many as it likes.
        pooled: The serials of those that wait in a pool, which will deal with them.
    """
    everything: Sequence[Observation] = tuple(observations)
    close_wait = sum(observation.state is State.CLOSE_WAIT for observation in everything)
    crowd = CloseWaitLoad(
        close_wait > settings.count_warning,
        fd_limit is not None and close_wait > fd_limit * settings.fd_share_critical,
    )
    return tuple([_leak(seen, settings, crowd, pooled) for seen in everything])


def _leak(
    observation: Observation, settings: Settings, crowd: CloseWaitLoad, pooled: Collection[int]
) -> Finding:
    verdict = verdict_of(observation, settings)
    if verdict in _DEALT_WITH_BY_POOLS and observation.record.serial in pooled:
        verdict = Verdict.STALE_POOL
    severity = _severity(verdict, observation, settings, crowd)
    hint = hint_for(
        verdict, observation.record.origin, observation.evidence, observation.connection
    )
    return Finding(observation, verdict, severity, (), hint)


def verdict_of(observation: Observation, settings: Settings) -> Verdict:
    """What is to be thought of one socket."""
    if observation.evidence in (Evidence.FINALIZED, Evidence.COLLECTED):
        return Verdict.DROPPED
    if observation.evidence is Evidence.INODE:
        return Verdict.CLOSED_ELSEWHERE
    if observation.connection is Connection.NOT_APPLICABLE:
        return Verdict.OPEN
    if observation.close_called:
        return _verdict_of_closed(observation, settings)
    if observation.connection is Connection.LIVE:
        return Verdict.CLOSING if observation.state in _ENDING else Verdict.OPEN
    if _still_sending(observation, settings):
        return Verdict.HALF_CLOSED
    unconnected = observation.connection in _UNCONNECTED
    if unconnected and observation.record.origin is Origin.NATIVE:
        # Native code prepares its sockets out of our sight.
        return Verdict.OPEN
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


def _severity(
    verdict: Verdict, observation: Observation, settings: Settings, crowd: CloseWaitLoad
) -> Severity:
    if verdict is Verdict.CLOSED_ELSEWHERE:
        return Severity.WARNING
    is_pooled = verdict is Verdict.STALE_POOL
    if not verdict.is_leak and not is_pooled:
        return Severity.INFO
    # A pool may keep a connection for as long as it likes; how many there are still matters.
    age = 0.0 if is_pooled else observation.ended_for
    in_crowd = observation.state is State.CLOSE_WAIT
    if age > settings.age_critical or (in_crowd and crowd.is_critical):
        return Severity.CRITICAL
    # A dropped one is certain and grows no older: there is nothing to wait for.
    certain = verdict is Verdict.DROPPED
    if certain or age > settings.age_warning or (in_crowd and crowd.is_large):
        return Severity.WARNING
    return Severity.INFO
