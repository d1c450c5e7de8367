"""Render the findings of one site: what happened, where it was opened, what to change. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from closewait_guard._format import (
    fit_path,
    format_duration_range,
    pluralize,
    summarize_addresses,
    truncate,
    unique,
    wrap_text,
)
from closewait_guard.model import (
    Connection,
    Evidence,
    Frame,
    FrameKind,
    Observation,
    Origin,
    SiteGroup,
    SocketRecord,
    Verdict,
)

__all__ = [
    "connection_summary",
    "frame_lines",
    "site_lines",
    "socket_kind",
    "verdict_name",
]


_MAX_USER_FRAMES = 8
_MAX_HOLDERS = 4


def site_lines(group: SiteGroup, where: str = "") -> Iterator[str]:
    """The lines of one site; the first has severity, count, verdict, kind and peers.

    Args:
        group: The findings of the site.
        where: In which processes they are, in a report of several.
    """
    observations = [finding.observation for finding in group.findings]
    record = observations[0].record
    yield from wrap_text(
        f"{group.severity.upper()}  {group.count:,} x {_describe_sockets(group, observations)}",
        "  ",
    )
    if group.count > len(observations):
        shown = f"all that follows is of {len(observations):,} of them"
        yield from wrap_text(f"  ({shown}; the others are only counted here)", "    ")
    for line in (where, connection_summary(observations), _describe_origin(observations)):
        if line:
            yield from wrap_text(f"  {line}", "    ")
    yield from _opening_lines(record)
    context = _describe_context(observation.record for observation in observations)
    if context:
        yield from wrap_text(f"  {context}", "    ")
    yield from _holder_lines(group)
    yield from _replaced_lines(group)
    yield from _closed_at_exit_lines(group)
    if group.findings[0].hint:
        yield from wrap_text(f"  fix: {group.findings[0].hint}", "    ")


def _holder_lines(group: SiteGroup) -> Iterator[str]:
    """The holders; those that differ only by an index or a key share a line.

    The search may not have come to all sockets: a line says for how many of them it is.
    """
    alike: dict[str, dict[str, None]] = {}
    held: Counter[str] = Counter()
    for finding in group.findings:
        for holder in finding.holders:
            alike.setdefault(_without_keys(holder), {})[holder] = None
        held.update(set(map(_without_keys, finding.holders)))
    total = len(group.findings)
    for key, (first, *others) in list(alike.items())[:_MAX_HOLDERS]:
        more = f", and {len(others):,} more like it" if others else ""
        of = f" ({held[key]:,} of the {total:,} sockets)" if held[key] < total else ""
        yield from wrap_text(f"  held by {first}{more}{of}", "    ")
    if len(alike) > _MAX_HOLDERS:
        yield f"    (and by {len(alike) - _MAX_HOLDERS:,} more)"


def _without_keys(holder: str) -> str:
    """Leave out indexes and keys, in linear time whatever brackets there are.

    Example:
        >>> _without_keys("app.pool['a'].free[12]"), _without_keys("odd [[ text")
        ('app.pool[].free[]', 'odd [[ text')
    """
    *closed, rest = holder.split("]")
    return "]".join([*(_up_to_bracket(part) for part in closed), rest])


def _up_to_bracket(part: str) -> str:
    before, bracket, _ = part.partition("[")
    return before + bracket


def _replaced_lines(group: SiteGroup) -> Iterator[str]:
    """How many have been replaced by a newer connection."""
    successors = [
        finding.replaced_by for finding in group.findings if finding.replaced_by is not None
    ]
    if successors:
        some = f"{len(successors):,} of them " if len(successors) < len(group.findings) else ""
        text = f"{some}replaced by #{max(successors)}, a newer connection from the same line"
        yield from wrap_text(f"  {text}", "    ")


def _closed_at_exit_lines(group: SiteGroup) -> Iterator[str]:
    """How many were closed only as the program ended."""
    closed = sum(finding.count for finding in group.findings if finding.closed_at_exit)
    if closed:
        some = f"{closed:,} of them " if closed < group.count else ""
        what = "closed only when the program ended, by a finalizer or with the event loop"
        yield from wrap_text(f"  {some}{what}", "    ")


def verdict_name(verdict: Verdict) -> str:
    """A verdict in words."""
    return "still open" if verdict is Verdict.OPEN else verdict.replace("_", " ")


def _describe_sockets(group: SiteGroup, observations: Sequence[Observation]) -> str:
    """Verdict, kind of socket and peers."""
    first = observations[0]
    kinds = unique(socket_kind(observation) for observation in observations)
    what = f"{verdict_name(group.verdict).upper()}  {', '.join(kinds)}"
    peers = [observation.peer for observation in observations if observation.peer]
    if peers:
        preposition = "from" if _is_accepted(first) else "to"
        return f"{what} {preposition} {summarize_addresses(peers)}"
    local = [
        observation.local
        for observation in observations
        if observation.local and not observation.local.endswith(":0")
    ]
    return f"{what} at {summarize_addresses(local)}" if local else what


def _is_accepted(observation: Observation) -> bool:
    return observation.record.opener.origin is Origin.ACCEPTED


def socket_kind(observation: Observation) -> str:
    """The kind of socket in everyday words: TCP, UDP, UNIX, TLS over TCP."""
    if observation.family in ("AF_INET", "AF_INET6"):
        protocol = {"SOCK_STREAM": "TCP", "SOCK_DGRAM": "UDP"}.get(observation.type)
        name = protocol or observation.type.removeprefix("SOCK_")
    elif observation.family == "AF_UNIX":
        kind = observation.type.removeprefix("SOCK_").lower()
        name = "UNIX" if kind == "stream" else f"UNIX {kind}"
    else:
        name = f"{observation.family.removeprefix('AF_')} {observation.type}"
    return f"TLS over {name}" if observation.tls else name


def connection_summary(observations: Sequence[Observation]) -> str:
    """What happened to the connection, how long ago, and how much is unread."""
    parts = [", or ".join(filter(None, unique(_describe_end(each) for each in observations)))]
    closed = [seconds for each in observations if (seconds := each.peer_closed_for) is not None]
    if closed:
        at_least = any(each.is_lower_bound for each in observations)
        ago = format_duration_range(min(closed), max(closed), at_least=at_least)
        parts[0] += f" {ago} ago"
    elif observations[0].connection is Connection.PEER_CLOSED:
        parts[0] += ", at an unknown time"
    traffic = [
        seconds for each in observations if (seconds := _seconds_since_traffic(each)) is not None
    ]
    if traffic:
        parts.append(f"last traffic {format_duration_range(min(traffic), max(traffic))} ago")
    if observations[0].close_called:
        parts.append("close() was called")
    unread = sum(observation.unread or 0 for observation in observations)
    if unread:
        parts.append(f"{pluralize(unread, 'byte')} unread")
    unsent = sum(observation.unsent or 0 for observation in observations)
    if unsent:
        parts.append(f"{pluralize(unsent, 'byte')} not yet taken by the peer")
    return "; ".join(part for part in parts if part)


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
        return "" if observation.close_called else f"the peer waits; {_describe_copy(record)}"
    if connection is Connection.UNCONNECTED and observation.evidence is Evidence.TCP_INFO:
        return "the connection was refused or failed"
    return _ENDS[connection]


def _describe_copy(record: SocketRecord) -> str:
    return f"process {record.pid} has it open unused, and its parent has closed it"


def _seconds_since_traffic(observation: Observation) -> float | None:
    """The time without traffic, for a connection that ended at an unknown time."""
    if observation.connection is not Connection.GONE:
        return None
    times = (observation.last_sent_for, observation.last_received_for)
    return min((seconds for seconds in times if seconds is not None), default=None)


def _describe_origin(observations: Sequence[Observation]) -> str:
    """How the descriptor came to be, unless it was simply created."""
    record = observations[0].record
    parent = record.parent.site if record.parent is not None else None
    where = f" at {parent.place}" if parent is not None else ""
    match record.opener.origin, record.origin:
        case Origin.ACCEPTED, _:
            if record.blamed is not record.opener:
                return f"accepted by library code{_describe_maker(record.blamed)}"
            return f"accepted by the listener opened{where}" if where else ""
        case _, Origin.DUPLICATED:
            return f"duplicated from the socket opened{where}" if where else ""
        case _, Origin.DETACHED:
            taken = _describe_taking(record)
            return f"its socket object gave the descriptor away by detach(){taken}"
        case _, Origin.WRAPPED if not observations[0].tls and (taken := _describe_taking(record)):
            return f"handed over by its number{taken}"
        case _, Origin.INHERITED:
            return (
                f"inherited over fork() from process {record.parent.pid}" if record.parent else ""
            )
        case _, Origin.NATIVE if not record.stack:
            if where:
                return f"a copy, as a mere number, of the socket opened{where}"
            return "opened by native code, or received as a number, at an unknown place"
        case _, Origin.ADOPTED:
            return f"{_describe_coming(record)}: where it was opened is unknown"
    return ""


def _describe_coming(record: SocketRecord) -> str:
    """How a descriptor came that was not opened here, as far as its record says."""
    if not record.stack:
        return "older than the guard"
    is_received = any(frame.module == "multiprocessing.reduction" for frame in record.stack)
    return "received by multiprocessing" if is_received else "came as a number"


def _describe_maker(listener: SocketRecord) -> str:
    """Where the socket was opened that a listener is a duplicate of."""
    made = listener.parent.site if listener.parent is not None else None
    if listener.origin is not Origin.DUPLICATED or made is None:
        return ""
    return f", by a duplicate of the listener opened at {made.place}"


def _describe_taking(record: SocketRecord) -> str:
    """Where another object has taken the descriptor over, unless it is still a mere number."""
    taken = replace(record, parent=None).site
    return f"; taken over at {taken.place}" if taken is not None and taken != record.site else ""


def _opening_lines(record: SocketRecord) -> Iterator[str]:
    site, blamed = record.site, record.blamed
    if site is None:
        if record.opened_at is not None and not blamed.stack and record.origin is not Origin.NATIVE:
            yield "  opened at an unknown place: stack_depth is 0"
        return
    opened = "  opened" if blamed is record.opener else "  listener opened"
    if blamed.origin is Origin.ADOPTED:
        opened = "  taken over"
    if site.is_awaiting:
        yield f"{opened} in a task"
        yield from frame_lines("    awaited from ", site)
    elif blamed.task is not None and site.kind is not FrameKind.USER:
        yield f"{opened} in a background task, no line of your code"
        yield from frame_lines("    at ", site)
    else:
        yield from frame_lines(f"{opened} at ", site)
    outer = blamed.stack[blamed.stack.index(site) + 1 :]
    shown = 0
    for is_user, frames in groupby(outer, key=lambda frame: frame.kind is FrameKind.USER):
        run = list(frames)
        if not is_user:
            yield f"    ({pluralize(len(run), 'library call')})"
            continue
        for frame in run[: _MAX_USER_FRAMES - shown]:
            yield from frame_lines("    from ", frame)
        shown += len(run)
        if shown > _MAX_USER_FRAMES:
            yield f"    ({pluralize(shown - _MAX_USER_FRAMES, 'more call')})"
            return


def frame_lines(prefix: str, frame: Frame) -> Iterator[str]:
    """One call of a stack, and its source line."""
    yield fit_path(prefix, frame.place, f" in {frame.function}()".replace(">()", ">"))
    if frame.source:
        yield truncate(" " * 8 + frame.source)


def _describe_context(records: Iterable[SocketRecord]) -> str:
    """Threads, tasks, labels and context, each value once."""
    openers = [record.opener for record in records]
    values_by_name = {
        "thread": unique(record.thread for record in openers if record.thread),
        "task": unique(record.task for record in openers if record.task),
        "label": unique(label for record in openers for label in record.labels),
    }
    parts = [f"{name} {_first_few(values)}" for name, values in values_by_name.items() if values]
    names = unique(name for record in openers for name in record.context)
    for name in names:
        values = unique(str(record.context[name]) for record in openers if name in record.context)
        parts.append(f"{name}={_first_few(values)}")
    return ", ".join(parts)


def _first_few(values: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(values[:limit])
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"
