"""What happened to a connection, in a few words. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from closewait_guard._format import format_bytes, format_duration_range, pluralize, unique
from closewait_guard.model import Connection, Evidence, Observation, Origin, State

__all__ = [
    "connection_summary",
]


def connection_summary(observations: Sequence[Observation]) -> str:
    """What happened to the connection, how long ago, and how much is unread."""
    if (owner := observations[0].owner) is not None:
        return "" if owner.is_surplus else _END_OF_OWNER.get(observations[0].evidence, "")
    parts = [_describe_ends(observations), _describe_unanswered(observations)]
    traffic = [
        seconds for each in observations if (seconds := _seconds_since_traffic(each)) is not None
    ]
    if traffic:
        parts.append(f"last traffic {format_duration_range(min(traffic), max(traffic))} ago")
    if observations[0].close_called:
        parts.append("close() was called")
    unread = sum(observation.unread or 0 for observation in observations)
    if unread:
        parts.append(f"{format_bytes(unread)} unread")
    unsent = sum(observation.unsent or 0 for observation in observations)
    if unsent:
        parts.append(f"{format_bytes(unsent)} not yet taken by the peer")
    return ", ".join(part for part in parts if part)


def _describe_ends(observations: Sequence[Observation]) -> str:
    """How the connections ended, and how long ago."""
    end = ", or ".join(filter(None, unique(_describe_end(each) for each in observations)))
    is_close_wait = all(each.state is State.CLOSE_WAIT for each in observations)
    if is_close_wait and end == _ENDS[Connection.PEER_CLOSED]:
        end = State.CLOSE_WAIT.value
    closed = [seconds for each in observations if (seconds := each.peer_closed_for) is not None]
    if closed:
        at_least = any(each.is_lower_bound for each in observations)
        since = format_duration_range(min(closed), max(closed), at_least=at_least)
        return f"{end} for {since}" if end == State.CLOSE_WAIT else f"{end} {since} ago".lstrip()
    if observations[0].connection is Connection.PEER_CLOSED:
        return f"{end}, {'since' if end == State.CLOSE_WAIT else 'at'} an unknown time"
    return end


def _describe_unanswered(observations: Sequence[Observation]) -> str:
    """For how long nothing has come back, and how often it was tried again."""
    found = [each.unanswered for each in observations if each.unanswered is not None]
    if not found:
        return ""
    seconds, heard = [each.seconds for each in found], [each.heard_for for each in found]
    since = format_duration_range(min(seconds), max(seconds), at_least=True)
    most = max(each.attempts for each in found)
    up_to = "" if all(each.attempts == most for each in found) else "up to "
    return (
        f"no answer for {since}, tried again {up_to}{pluralize(most, 'time')}, peer last heard "
        f"from {format_duration_range(min(heard), max(heard))} ago"
    )


_END_OF_OWNER = {
    Evidence.FINALIZED: "its last reference went away without its close",
    Evidence.COLLECTED: "collected without its close, in a reference cycle",
    Evidence.OWNER: "out of use, and not closed",
    Evidence.OPEN_OWNER: "open, and not closed",
}
_ENDS = {
    Connection.NEVER_CONNECTED: "never connected",
    Connection.UNCONNECTED: "refused, or never connected",
    Connection.LIVE: "",
    Connection.PEER_CLOSED: "peer closed",
    Connection.GONE: "connection reset or ended",
    Connection.NOT_APPLICABLE: "",
}


def _describe_end(observation: Observation) -> str:
    """How the connection ended, as far as the evidence shows."""
    connection, record = observation.connection, observation.record
    if connection is Connection.LIVE and record.origin is Origin.INHERITED:
        # Without a call of close(): a copy that is reported for that reason says so itself.
        return "" if observation.close_called else f"the peer waits; {_describe_copy(observation)}"
    if connection is Connection.UNCONNECTED and observation.evidence is Evidence.TCP_INFO:
        return "the connection was refused or failed"
    return _ENDS[connection]


def _describe_copy(seen: Observation) -> str:
    unused = " unused" if seen.suspect_for is not None else ""
    return f"process {seen.record.pid} has it open{unused}, and its parent has closed it"


def _seconds_since_traffic(observation: Observation) -> float | None:
    """The time without traffic, for a connection that ended at an unknown time."""
    if observation.connection is not Connection.GONE:
        return None
    times = (observation.last_sent_for, observation.last_received_for)
    return min((seconds for seconds in times if seconds is not None), default=None)
