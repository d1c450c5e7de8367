"""From births to observations: look at the suspects, remember since when they are suspects."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from closewait_guard._birth import Birth, inode_of
from closewait_guard._probe import Poller, Probe, View, borrowed
from closewait_guard._readers import descriptors_in_use
from closewait_guard._registry import Living, Registry
from closewait_guard._since import Sighting, notice, peer_closed_for, suspect_for
from closewait_guard.model import Connection, Evidence, Observation, Origin, SocketRecord, State

__all__ = ["Observer", "Sight"]


class Sight(NamedTuple):
    """What one scan saw."""

    open_sockets: int
    suspects: tuple[Observation, ...]
    dropped: tuple[Observation, ...]
    healthy: tuple[Observation, ...]


class Observer:
    """Looks at what a registry knows. Keeps the sightings of the suspects between two looks."""

    def __init__(self, registry: Registry, probe: Probe) -> None:
        self._registry = registry
        self._probe = probe
        self._sightings: dict[int, Sighting] = {}
        self._records: dict[int, SocketRecord] = {}
        self._last_look = 0.0
        # One poller serves one thread at a time. Taking it out of a list is atomic: a scan in a
        # second thread, in a signal handler or in a forked child makes its own.
        self._idle_pollers: list[Poller] = []

    def look(self, *, full: bool = False, born_after: int | None = None) -> Sight:
        """Look at every open socket, and describe the suspects.

        Args:
            full: Describe the healthy sockets too.
            born_after: A mark; describe all sockets born after it, healthy or not.
        """
        living = self._registry.living()
        events = self._events(living)
        glance = _Glance(
            self._registry, self._probe, living, events, self._records, self._last_look
        )
        suspects = tuple(glance.describe(living.close_called.union(events), self._sightings))
        others = set(living.stories) if full else set()
        if born_after is not None:
            others |= living.born_after(born_after)
        healthy = tuple(glance.describe(others - events.keys() - living.close_called, {}))
        dropped = tuple(self._dropped())
        self._sightings, self._records = glance.sightings, glance.records
        self._last_look = glance.wall
        return Sight(
            open_sockets=len(living.stories) + len(living.detached),
            suspects=suspects,
            dropped=dropped,
            healthy=healthy,
        )

    def after_fork(self) -> None:
        """In the child: every record known so far is now of an inherited socket."""
        self._records = {}

    def _events(self, living: Living) -> dict[int, int]:
        poller = self._idle_pollers.pop() if self._idle_pollers else self._probe.poller()
        events = poller.suspects(living.stories.keys() | living.detached.keys())
        self._idle_pollers.append(poller)
        return events

    def _dropped(self) -> Iterator[Observation]:
        for drop in self._registry.dropped():
            evidence = Evidence.COLLECTED if drop.collected else Evidence.FINALIZED
            view = (drop.view or _UNKNOWN)._replace(evidence=evidence)
            record = self._records.get(drop.birth.serial) or self._registry.record_of(drop.birth)
            yield _observation(record, drop.fd, view, peer_closed_for=view.fin_for)


class _Glance:
    """One moment's look: what is common to all the sockets described in it."""

    def __init__(
        self,
        registry: Registry,
        probe: Probe,
        living: Living,
        events: dict[int, int],
        records: dict[int, SocketRecord],
        last_look: float,
    ) -> None:
        self.now, self.wall = time.monotonic(), time.time()
        self.sightings: dict[int, Sighting] = {}
        self.records: dict[int, SocketRecord] = {}
        self._registry = registry
        self._probe = probe
        self._living = living
        self._events = events
        self._known = records
        self._last_look = last_look
        self._in_use = descriptors_in_use() if living.close_called else set()

    def describe(self, fds: set[int], before: dict[int, Sighting]) -> Iterator[Observation]:
        for fd in sorted(fds):
            birth = self._living.birth(fd)
            view = self._view(fd, birth) if birth is not None else None
            if birth is not None and view is not None:
                yield self._observation(fd, birth, view, before)

    def _view(self, fd: int, birth: Birth) -> View | None:
        events = self._events.get(fd, 0)
        if fd in self._living.detached:
            return self._view_through_copy(fd, events)
        sock = birth.sock()
        return self._probe.look(sock, fd, events) if sock is not None else None

    def _view_through_copy(self, fd: int, events: int) -> View | None:
        try:
            with borrowed(fd) as sock:
                return self._probe.look(sock, sock.fileno(), events)
        except OSError:
            return None

    def _observation(
        self, fd: int, birth: Birth, view: View, before: dict[int, Sighting]
    ) -> Observation:
        record = self._record(fd, birth)
        close_called = fd in self._living.close_called
        sighting = notice(
            view, close_called, before.get(birth.serial), self._at_most(birth, view), self.now
        )
        self.sightings[birth.serial] = sighting
        return _observation(
            record,
            fd,
            view,
            inode=inode_of(fd),
            peer_closed_for=peer_closed_for(view, sighting, self.now),
            tls=_is_tls(birth),
            close_called=close_called,
            suspect_for=suspect_for(view, sighting, self.now),
            in_use=fd in self._in_use,
        )

    def _record(self, fd: int, birth: Birth) -> SocketRecord:
        record = self._known.get(birth.serial) or self._registry.record_of(birth)
        self.records[birth.serial] = record
        if fd in self._living.detached:
            return replace(record, origin=Origin.DETACHED, parent=record)
        return record

    def _at_most(self, birth: Birth, view: View) -> float:
        """For how long a connection can have been ended that no look has seen so before."""
        if (birth.born_at or 0.0) < self._last_look:
            return 0.0
        bounds = [view.last_sent_for, view.last_received_for]
        if birth.born_at is not None:
            bounds.append(self.wall - birth.born_at)
        return max(0.0, min((bound for bound in bounds if bound is not None), default=0.0))


def _observation(
    record: SocketRecord,
    fd: int,
    view: View,
    *,
    inode: int | None = None,
    peer_closed_for: float | None = None,
    tls: bool = False,
    close_called: bool = False,
    suspect_for: float | None = None,
    in_use: bool = False,
) -> Observation:
    return Observation(
        record=record,
        fd=fd,
        inode=inode,
        family=view.family,
        type=view.type,
        local=view.local,
        peer=view.peer,
        state=view.state,
        evidence=view.evidence,
        peer_closed_for=peer_closed_for,
        unread=view.unread,
        last_sent_for=view.last_sent_for,
        last_received_for=view.last_received_for,
        tls=tls,
        close_called=close_called,
        connection=view.connection,
        suspect_for=suspect_for,
        unsent=view.unsent,
        in_use=in_use,
    )


_UNKNOWN = View(
    "unknown", "unknown", None, None, State.NONE, Evidence.POLL, Connection.NOT_APPLICABLE
)


def _is_tls(birth: Birth) -> bool:
    ssl = sys.modules.get("ssl")
    sock = birth.sock()
    return ssl is not None and isinstance(sock, ssl.SSLSocket)
