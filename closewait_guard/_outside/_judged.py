"""From what was seen of a process to its report, by the same rules as from inside."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace

from closewait_guard._hints import hint_for
from closewait_guard._judge import judge
from closewait_guard._observed import observed
from closewait_guard._outside._sight import Copy, Descriptor, Sight
from closewait_guard._since import Sighting, notice, suspect_for
from closewait_guard._thresholds import crossed
from closewait_guard._words import count_of
from closewait_guard.model import (
    SCHEMA,
    Coverage,
    Leak,
    Observation,
    Origin,
    Report,
    SocketRecord,
    State,
    Verdict,
)
from closewait_guard.settings import Settings

__all__ = ["Known", "judged", "record_of"]

# It does not show from outside.
_CLOSE_CALLED = False

# By process, descriptor and inode.
_Key = tuple[int, int, int | None]
Known = dict[_Key, Sighting]


def judged(
    sight: Sight,
    settings: Settings,
    before: Known,
    after: Known | None,
    now: float,
    *,
    everything: bool,
) -> Report:
    """The report of one process.

    Args:
        sight: What was seen.
        settings: The thresholds.
        before: What the look before has remembered.
        after: Takes what this one remembers; None if it is the last.
        now: The monotonic time of the look.
        everything: Tell the healthy sockets too.
    """
    pid = sight.process.pid
    records = _Records(sight)
    ended = []
    for each in sight.ended:
        key = (pid, each.fd, each.endpoint.inode)
        ages = _ages(each, key, before, after, now)
        ended.append(observed(records.of(each), each.fd, each.endpoint, each.view, *ages))
    leaks = judge(ended, settings, sight.process.fd_limit)
    spared = [leak.observation for leak in leaks if leak.verdict is Verdict.OPEN]
    healthy = [
        observed(records.of(each), each.fd, each.endpoint, each.view) for each in sight.others
    ]
    wrong = [_held(leak, sight) for leak in leaks if leak.verdict is not Verdict.OPEN]
    report = _report(
        sight,
        tuple(wrong if sight.process.python else map(_without_python, wrong)),
        (*spared, *healthy) if everything else (),
    )
    return replace(report, alerts=crossed(report, settings))


def _ages(
    each: Descriptor, key: _Key, before: Known, after: Known | None, now: float
) -> tuple[float | None, float | None]:
    """For how long the peer has been gone, and nothing been done about it."""
    dated = each.view.fin_for
    if dated is not None and after is None:
        return dated, dated
    sighting = notice(each.view, _CLOSE_CALLED, before.get(key), 0.0, now)
    if after is not None:
        after[key] = sighting
    # A look from outside that is the first to see an end knows nothing of its age.
    closed_for = None if dated is None else now - sighting.since
    return closed_for, suspect_for(each.view, sighting, now)


def record_of(pid: int, origin: Origin, parent: SocketRecord | None = None) -> SocketRecord:
    """All that is known of a birth that nobody has watched."""
    return SocketRecord(0, pid, None, "", None, (), {}, origin, parent, ())


class _Records:
    """One record for all descriptors of a process that have come to it in the same way."""

    def __init__(self, sight: Sight) -> None:
        self._copies = sight.copies
        pid, self._parent = sight.process.pid, sight.process.parent
        own = Origin.ADOPTED if sight.process.python else Origin.NATIVE
        self._plain = {
            accepted: record_of(pid, Origin.ACCEPTED if accepted else own)
            for accepted in (False, True)
        }
        self._inherited = {
            accepted: record_of(
                pid,
                Origin.INHERITED,
                record_of(self._parent, Origin.ACCEPTED if accepted else own),
            )
            for accepted in (False, True)
        }

    def of(self, each: Descriptor) -> SocketRecord:
        copies = self._copies.get(each.endpoint.inode or 0, ())
        if copies and any(copy.pid == self._parent for copy in copies):
            return self._inherited[each.accepted]
        return self._plain[each.accepted]


def _held(leak: Leak, sight: Sight) -> Leak:
    """Who else has the same socket open: the peer hears of no end until all have closed it."""
    copies = sight.copies.get(leak.observation.inode or 0, ())
    if not copies:
        return leak
    fd, own = leak.observation.fd, sight.process.pid
    others = [copy for copy in copies if (copy.pid, copy.fd) != (own, fd)]
    return replace(leak, holders=tuple(_told(copy, own) for copy in others))


def _without_python(leak: Leak) -> Leak:
    """What to change in a program in C, for instance."""
    seen = leak.observation
    return replace(leak, hint=hint_for(leak.verdict, Origin.NATIVE, seen.evidence, seen.connection))


def _told(copy: Copy, own: int) -> str:
    if copy.pid == own:
        return f"descriptor {copy.fd} of the same process too"
    return f"process {copy.pid} ({copy.program}) too"


def _report(sight: Sight, leaks: tuple[Leak, ...], observations: tuple[Observation, ...]) -> Report:
    process = sight.process
    return Report(
        schema=SCHEMA,
        taken_at=time.time(),
        host=socket.gethostname(),
        pid=process.pid,
        command=process.program,
        python=process.python,
        open_sockets=sum(sight.states.values()),
        fd_used=process.fd_used,
        fd_limit=process.fd_limit,
        coverage=Coverage(0, 0, 0, 0, 0, tuple(_notes(sight))),
        leaks=leaks,
        observations=observations,
    )


def _notes(sight: Sight) -> Iterator[str]:
    how = ": for that start it by `closewait-guard run`" if sight.process.python else ""
    yield f"from outside where a socket was born{how}"
    if not sight.dated and sight.states.get(State.CLOSE_WAIT):
        yield "since when the peers have closed, which the kernel has told nobody"
    closed = sight.states.get(State.CLOSE, 0)
    if closed:
        yield (
            f"since when {count_of(closed, 'TCP socket')} without a connection "
            "(never connected, refused or reset) has been so"
        )
    unix = sight.states.get("UNIX", 0)
    if unix:
        yield f"whether the peers of {count_of(unix, 'UNIX socket')} have closed"
    for address, times in sight.backlog.items():
        yield (
            f"who is to take {count_of(times, 'connection')} in CLOSE_WAIT from the backlog of "
            f"{address}, which nobody has accepted"
        )
    for address, times in sight.uncertain_backlog.items():
        yield (
            f"which process is to take {count_of(times, 'connection')} in CLOSE_WAIT from the "
            f"backlog of {address}: another listens at this address, too"
        )
