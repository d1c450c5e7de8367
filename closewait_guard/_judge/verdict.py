"""The rules by which an observation gets its verdict and severity. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from closewait_guard._enums import GONE, LEAKS
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
    "FindingText",
    "excusable_by_calls",
    "judge",
    "leave_to_calls",
    "leave_to_pools",
    "leave_undecided",
    "verdict_of",
]


_ENDING = frozenset(
    {State.FIN_WAIT1, State.FIN_WAIT2, State.CLOSING, State.LAST_ACK, State.TIME_WAIT}
)

_UNCONNECTED = frozenset({Connection.NEVER_CONNECTED, Connection.UNCONNECTED})
_ENDED = _UNCONNECTED | {Connection.PEER_CLOSED, Connection.GONE}

# What the rules for a leak compare with: Python 3.11 takes long to find a member by its name.
_PEER_CLOSED, _INHERITED, _CLOSE_WAIT = (
    Connection.PEER_CLOSED,
    Origin.INHERITED,
    State.CLOSE_WAIT,
)
_LEAKED, _INFO, _WARNING = Verdict.LEAKED, Severity.INFO, Severity.WARNING

# Evidence that leaves nothing to judge.
_BY_EVIDENCE = {
    Evidence.FINALIZED: Verdict.DROPPED,
    Evidence.COLLECTED: Verdict.DROPPED,
    Evidence.INODE: Verdict.CLOSED_ELSEWHERE,
}

_CLOSED_BY_POOLS = frozenset({Verdict.LEAKED, Verdict.DEAD})

# What the verdicts become while a running call has not done with the connection.
_IN_CALLS = {
    Verdict.LEAKED: Verdict.HALF_CLOSED,
    Verdict.DEAD: Verdict.HALF_CLOSED,
    Verdict.LINGERING: Verdict.OPEN,
}

# For one address, as many as the pools of requests, urllib3 and botocore keep by default.
_MAX_IDLE = 10

# The kernel counts in ticks of up to 10 ms, and two of its times are compared.
_TICK = 0.02


# The holders, hint, successor, code and packages of a finding.
FindingText: TypeAlias = tuple[tuple[str, ...], str, int | None, str, str, str, str]
_NO_TEXT: FindingText = (), "", None, "", "", "", ""


class CloseWaitLoad(NamedTuple):
    """Whether there are so many sockets in CLOSE_WAIT that each of them is more severe."""

    is_large: bool
    is_critical: bool


def judge(
    observations: Iterable[Observation],
    settings: Settings,
    fd_limit: int | None,
    texts: Mapping[int, FindingText] = MappingProxyType({}),
) -> tuple[Finding, ...]:
    """Give every observation its verdict and severity. Hints depend on the holders.

    Severity rises with the number of sockets in CLOSE_WAIT among all that are given, so give all
    of a report at once.

    Args:
        observations: All suspects of a report.
        settings: The thresholds.
        fd_limit: How many descriptors the process may have; None if there is no limit.
        texts: By serial, what is known of the holders; it may not fit any more.
    """
    suspects: Sequence[Observation] = tuple(observations)
    load = _close_wait_load(suspects, settings, fd_limit)
    return tuple(
        [
            _make_finding(
                each,
                verdict_of(each, settings),
                settings,
                load,
                texts.get(each.record.serial, _NO_TEXT),
            )
            for each in suspects
        ]
    )


def leave_to_pools(
    findings: tuple[Finding, ...], idle: Collection[int], settings: Settings, fd_limit: int | None
) -> tuple[Finding, ...]:
    """The findings, where those that are idle in a pool are not leaks: the pool will close them.

    Args:
        findings: All of a report.
        idle: The serials of the sockets that are idle in a pool.
        settings: The thresholds.
        fd_limit: As for `judge`.
    """
    if not idle:
        return findings
    load = _close_wait_load([each.observation for each in findings], settings, fd_limit)
    return tuple(
        _make_finding(each.observation, Verdict.STALE_POOL, settings, load)
        if each.verdict in _CLOSED_BY_POOLS and each.observation.record.serial in idle
        else each
        for each in findings
    )


def leave_undecided(
    findings: tuple[Finding, ...], settings: Settings, fd_limit: int | None
) -> tuple[Finding, ...]:
    """The findings from outside, where the few that an idle pool may hold are no certain leaks.

    Their age says nothing: a pool may keep a connection for any time.

    Args:
        findings: All of a process.
        settings: The thresholds.
        fd_limit: As for `judge`.
    """
    load = _close_wait_load([each.observation for each in findings], settings, fd_limit)
    if load.is_large or load.is_critical:
        return findings
    peers = Counter(each.observation.peer for each in findings if _may_be_idle(each))
    return tuple(
        _make_finding(each.observation, Verdict.IDLE_OR_LEAKED, settings, load)
        if _may_be_idle(each) and peers[each.observation.peer] <= _MAX_IDLE
        else each
        for each in findings
    )


def _may_be_idle(finding: Finding) -> bool:
    """Whether a client may keep it for the next request: nothing is left to read."""
    seen = finding.observation
    is_client = seen.record.origin is not Origin.ACCEPTED
    return finding.verdict is _LEAKED and is_client and not seen.unread


def excusable_by_calls(
    findings: tuple[Finding, ...], settings: Settings, fd_limit: int | None
) -> tuple[Finding, ...]:
    """The findings that are not leaks yet if a running call has not done with the connection.

    Beyond a threshold a call excuses nothing: it may never end.

    Args:
        findings: All of a report.
        settings: The thresholds.
        fd_limit: As for `judge`.
    """
    load = _close_wait_load([each.observation for each in findings], settings, fd_limit)
    return tuple(
        each
        for each in findings
        if each.verdict in _IN_CALLS
        # Cheap first: there may be very many.
        and not (load.is_large and each.observation.state is _CLOSE_WAIT)
        and _exceeded(each.observation, each.observation.ended_for, settings, load) is None
    )


def leave_to_calls(findings: tuple[Finding, ...], used: Collection[int]) -> tuple[Finding, ...]:
    """The findings, where those that a running call has not done with are not leaks yet.

    Args:
        findings: All of a report.
        used: The serials of the sockets that running calls use, of those that they may excuse.
    """
    if not used:
        return findings
    return tuple(
        Finding(each.observation, _IN_CALLS[each.verdict], _INFO, *_NO_TEXT)
        if each.observation.record.serial in used
        else each
        for each in findings
    )


def _close_wait_load(
    observations: Sequence[Observation], settings: Settings, fd_limit: int | None
) -> CloseWaitLoad:
    # What was collected was closed by that, and only its record remains.
    close_wait = sum(
        each.state is _CLOSE_WAIT and each.evidence not in GONE for each in observations
    )
    return CloseWaitLoad(
        close_wait > settings.count_warning,
        fd_limit is not None and close_wait > fd_limit * settings.fd_share_critical,
    )


def _make_finding(
    observation: Observation,
    verdict: Verdict,
    settings: Settings,
    load: CloseWaitLoad,
    text: FindingText = _NO_TEXT,
) -> Finding:
    severity = _severity(verdict, observation, settings, load)
    return Finding(observation, verdict, severity, *text)


def verdict_of(observation: Observation, settings: Settings) -> Verdict:
    """The verdict on one socket, or on an owner that should have been closed."""
    if observation.owner is not None and observation.evidence is Evidence.OPEN_OWNER:
        return Verdict.OPEN
    if observation.owner is not None:
        return Verdict.SURPLUS if observation.owner.is_surplus else Verdict.UNCLOSED
    if observation.evidence in _BY_EVIDENCE:
        return _BY_EVIDENCE[observation.evidence]
    if observation.connection in _ENDED and not observation.close_called:
        return _verdict_of_ended(observation, settings)
    if observation.checkout is not None:
        return Verdict.CHECKED_OUT
    if observation.connection is Connection.NOT_APPLICABLE:
        return Verdict.OPEN
    if observation.close_called:
        return _verdict_of_closed(observation, settings)
    return _verdict_of_live(observation, settings)


def _verdict_of_ended(observation: Observation, settings: Settings) -> Verdict:
    """The program still has what the peer has closed, or what is gone."""
    connection, origin = observation.connection, observation.record.origin
    if connection is _PEER_CLOSED and _is_still_sending(observation, settings):
        return Verdict.HALF_CLOSED
    unconnected = connection in _UNCONNECTED
    if unconnected and origin is Origin.NATIVE:
        # Native code may be about to connect it, which cannot be seen here.
        return Verdict.OPEN
    if not _is_past_grace(observation, settings):
        return Verdict.OPEN if unconnected else Verdict.CLOSING
    if origin is _INHERITED:
        return Verdict.INHERITED
    return _LEAKED if connection is _PEER_CLOSED else Verdict.DEAD


def _verdict_of_live(observation: Observation, settings: Settings) -> Verdict:
    """The peer waits, or is gone: no leak, but for a copy that only this process keeps open."""
    if observation.record.origin is Origin.INHERITED and _is_past_grace(observation, settings):
        return Verdict.INHERITED
    unanswered = observation.unanswered
    if unanswered is not None and unanswered.seconds >= settings.unanswered_grace:
        return Verdict.UNANSWERED
    return Verdict.CLOSING if observation.state in _ENDING else Verdict.OPEN


def _verdict_of_closed(observation: Observation, settings: Settings) -> Verdict:
    """After `close()`: a file object that a thread is reading is in use, others linger."""
    if observation.in_use:
        return Verdict.OPEN
    return Verdict.LINGERING if _is_past_grace(observation, settings) else Verdict.CLOSING


def _is_past_grace(observation: Observation, settings: Settings) -> bool:
    return observation.suspect_for is not None and observation.suspect_for >= settings.grace


def _is_still_sending(observation: Observation, settings: Settings) -> bool:
    """Whether the program has sent since the peer closed its side, and not long ago."""
    if observation.unsent:
        return True
    sent, closed = observation.last_sent_for, observation.peer_closed_for
    if sent is None or closed is None:
        return False
    after_closing = sent + _TICK < closed
    return after_closing and sent < max(settings.grace, settings.half_close_idle)


def _severity(
    verdict: Verdict, observation: Observation, settings: Settings, load: CloseWaitLoad
) -> Severity:
    if verdict in LEAKS:
        return _exceeded(observation, observation.ended_for, settings, load) or _WARNING
    if verdict is Verdict.STALE_POOL:
        # A pool may keep a connection for any time, so age does not matter; their number does.
        return _exceeded(observation, 0.0, settings, load) or _INFO
    if verdict is Verdict.UNANSWERED:
        # Clients come and go; that of which the program waits for an answer should not.
        is_client = observation.record.opener.origin is not Origin.ACCEPTED
        return _WARNING if is_client else _INFO
    return _WARNING if verdict is Verdict.CLOSED_ELSEWHERE else _INFO


def _exceeded(
    observation: Observation, age: float, settings: Settings, load: CloseWaitLoad
) -> Severity | None:
    """The severity that the thresholds give, if one is exceeded."""
    in_close_wait = observation.state is _CLOSE_WAIT
    if age > settings.age_critical or (in_close_wait and load.is_critical):
        return Severity.CRITICAL
    if age > settings.age_warning or (in_close_wait and load.is_large):
        return _WARNING
    return None
