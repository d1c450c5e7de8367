"""One scan of all open sockets: poll all, probe and describe the suspects, remember their ages.

It covers the sockets with an object, and the native ones.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import NamedTuple, Protocol

from closewait_guard._capture import (
    SERIAL,
    SOCK,
    CreationTuple,
    DroppedSocket,
    OpenSockets,
    Probing,
    Registry,
    pop_if_same,
)
from closewait_guard._clock import now, pause, wall
from closewait_guard._inspect.closed_elsewhere import ClosedElsewhere, Forked, ForkedCopies
from closewait_guard._inspect.native import SETTLED_AFTER, CallAttribution, NativeSockets
from closewait_guard._inspect.observation import (
    ScanResult,
    SuspectAge,
    fds_being_read,
    longest_possible,
    make_observation,
    peer_closed_for,
    suspect_for,
    update_age,
)
from closewait_guard._inspect.probe import (
    INVALID,
    Endpoint,
    Poller,
    Probe,
    ProbeResult,
    duplicate_fd,
    endpoint_of,
    endpoint_of_snapshot,
)
from closewait_guard._inspect.records import Makers, record_of
from closewait_guard._inspect.unanswered import UnansweredSockets
from closewait_guard._interruptions import interrupts
from closewait_guard.model import (
    UNKNOWN_FAMILY,
    Connection,
    Evidence,
    Observation,
    Origin,
    SocketRecord,
    State,
    Unanswered,
)
from closewait_guard.settings import Settings

__all__ = [
    "Scanner",
    "SocketScanner",
]


class _Known(NamedTuple):
    """What is kept of a suspect from one scan to the next, until something happens to it.

    Attributes:
        result: What the probe showed when something had happened the last time.
    """

    record: SocketRecord
    endpoint: Endpoint
    age: SuspectAge
    result: ProbeResult


class _ScanTime(NamedTuple):
    """When a scan covered all that was open, and the serial of the latest creation then."""

    at: float
    last_serial: float


class Source(Forked, Protocol):
    """Where creations are known: the registry, or the native sockets."""

    @property
    def pid(self) -> int: ...

    def open_sockets(self, *, thorough: bool = ...) -> OpenSockets: ...
    def last_serial(self) -> int: ...
    def discard(self, fd: int, creation: CreationTuple) -> None: ...
    def dropped(self) -> tuple[DroppedSocket, ...]: ...
    def last_open(self) -> Iterable[CreationTuple]: ...


class Scanner:
    """Scans what a source knows. Keeps what is known of the suspects between two scans.

    Several threads may scan at once, also in signal handlers and in forked children, so no lock is
    taken: what is kept is written entry by entry, or replaced as a whole.
    """

    def __init__(self, source: Source, probe: Probe, settings: Settings, since: float) -> None:
        self._source = source
        self._age_warning = settings.age_warning
        self._probe = probe
        self._known: dict[int, _Known] = {}
        self._seen_dropped: dict[int, Observation] = {}
        self._closed_elsewhere = ClosedElsewhere()
        self.forked_copies = ForkedCopies(source, settings.grace)
        self.unanswered = UnansweredSockets(probe, settings.unanswered_grace)
        self._last_scan = _ScanTime(since, -math.inf)
        # One poller serves one thread at a time. Taking it out of a list is atomic: a scan in a
        # second thread, in a signal handler or in a forked child makes its own.
        self._idle_pollers: list[Poller] = []

    def scan(self, *, full: bool = False, opened_after: int | None = None) -> ScanResult:
        """Look at every open socket, and describe the suspects.

        Args:
            full: Describe the healthy sockets too.
            opened_after: A mark; describe all sockets opened after it, healthy or not.
        """
        # Before the poll, so that what another scan adds meanwhile is not forgotten.
        known_before = self._known.copy()
        open_sockets = self._source.open_sockets(thorough=full or opened_after is not None)
        events = self._events(open_sockets)
        creations, unanswered = open_sockets.creations, dict[int, Unanswered]()
        if opened_after is None:
            everything = full or self.forked_copies.is_last
            unanswered = self.unanswered.find(open_sockets, events, everything=everything)
        to_describe = set(creations) if full else events.keys() | unanswered.keys()
        closed_elsewhere = self._closed_elsewhere.detect(creations, events, to_describe)
        closed = self._forget_closed(open_sockets, events)
        context = _ScanContext(
            self._source,
            self._probe,
            open_sockets,
            events,
            self._last_scan,
            self.forked_copies,
            self._age_warning,
            unanswered,
        )
        suspected = open_sockets.close_called.union(events, context.copies, unanswered)
        suspected -= closed_elsewhere
        suspects = tuple(context.describe(suspected, self._known))
        for serial in known_before.keys() - context.described:
            pop_if_same(self._known, serial, known_before[serial])
        self._last_scan = max(self._last_scan, context.time)
        others = set(creations) if full else set()
        if opened_after is not None:
            others |= open_sockets.opened_after(opened_after)
        others -= suspected | closed_elsewhere
        healthy = tuple(context.describe(others, {}))
        return ScanResult(
            open_sockets=len(creations) - closed,
            suspects=(*suspects, *self._describe_closed_elsewhere()),
            dropped=self._dropped(),
            healthy=healthy,
            undescribed=context.undescribed,
            # One may have been dropped when it had been described.
        ).only(lambda seen: seen.record.serial not in self._seen_dropped)

    def after_fork(self) -> None:
        """In the child: every record known so far is now of an inherited socket."""
        self._known = {}
        self.forked_copies.after_fork()
        self.unanswered.after_fork()

    def _events(self, open_sockets: OpenSockets) -> dict[int, int]:
        try:
            poller = self._idle_pollers.pop()
        except IndexError:
            poller = self._probe.poller()
        events = poller.suspects(open_sockets.creations)
        self._idle_pollers.append(poller)
        return events

    def _forget_closed(self, open_sockets: OpenSockets, events: dict[int, int]) -> int:
        """Remove those whose numbers are free: they were closed since the latest sweep."""
        closed = [fd for fd, happened in events.items() if happened & INVALID]
        for fd in closed:
            del events[fd]
            if fd in open_sockets.creations:
                self._source.discard(fd, open_sockets.creations[fd])
        return len(closed)

    def _describe_closed_elsewhere(self) -> Iterator[Observation]:
        for foreign_close in self._closed_elsewhere.current():
            endpoint = foreign_close.endpoint()
            if endpoint is not None:
                record = record_of(foreign_close.creation, self._source.pid)
                result = _NOTHING_SEEN._replace(evidence=Evidence.INODE)
                yield make_observation(record, foreign_close.fd, endpoint, result)

    def _dropped(self) -> tuple[Observation, ...]:
        """What was dropped stays as it was: each is described once."""
        before, now = self._seen_dropped, {}
        for drop in self._source.dropped():
            if drop.is_left_to_exit:
                continue
            serial = drop.creation[SERIAL]
            now[serial] = before.get(serial) or self._describe_drop(drop)
        self._seen_dropped = now
        return tuple(now.values())

    def _describe_drop(self, drop: DroppedSocket) -> Observation:
        evidence = Evidence.COLLECTED if drop.collected else Evidence.FINALIZED
        result = self._probe.probe_snapshot(drop.snapshot)._replace(evidence=evidence)
        record = record_of(drop.creation, self._source.pid)
        endpoint = endpoint_of_snapshot(drop.snapshot)
        return make_observation(record, drop.fd, endpoint, result, result.fin_for)


# What a probe has shown, and when it began and was over.
_Answer = tuple[ProbeResult, Endpoint, float, float]
_NOTHING_SEEN = ProbeResult(State.NONE, Evidence.POLL, Connection.NOT_APPLICABLE)
_UNKNOWN = Endpoint(UNKNOWN_FAMILY, "unknown", None, None)
# The ends of a connection after which it has the addresses that it will ever have.
_ENDED = frozenset({Connection.PEER_CLOSED, Connection.GONE})
# It was closed, its number is now another file's, or its kind has no addresses.
_NOTHING_TO_PROBE = frozenset({errno.EBADF, errno.ENOTSOCK, errno.EOPNOTSUPP})


class _ScanContext:
    """What is common to all the sockets that one scan describes."""

    def __init__(
        self,
        source: Source,
        probe: Probe,
        open_sockets: OpenSockets,
        events: Mapping[int, int],
        last_scan: _ScanTime,
        forked_copies: ForkedCopies,
        age_warning: float,
        unanswered: Mapping[int, Unanswered],
    ) -> None:
        self._age_warning, self._unanswered = age_warning, unanswered
        self.time = _ScanTime(now(), source.last_serial())
        self._wall = wall()
        self._source = source
        self._makers = Makers(source.last_open)
        self._probe = probe
        self._open_sockets = open_sockets
        self._events = events
        self._last_scan = last_scan
        self._forked_copies = forked_copies
        # Live connections that nothing has happened on.
        copies = forked_copies.find(open_sockets, source.pid)
        self.copies = {fd: copies[fd] for fd in copies.keys() - events.keys()}
        # The serials of those described, and how many could not be, except for their creation.
        self.described: set[int] = set()
        self.undescribed = 0
        self._in_use = fds_being_read() if open_sockets.close_called else frozenset[int]()

    def describe(self, fds: Set[int], known: dict[int, _Known]) -> Iterator[Observation]:
        """Observations of the given descriptors; of none that is closed at this moment.

        Args:
            fds: Which.
            known: What is known of them. What is found out is added.
        """
        for fd in sorted(fds):
            creation = self._open_sockets.creations[fd]
            try:
                seen = self._described(fd, creation, known)
            except Exception as error:
                if interrupts(error):
                    raise
                # One that cannot be described hides no other, and counts as one that is open.
                self.undescribed += 1
                record = record_of(creation, self._source.pid)
                seen = make_observation(record, fd, _UNKNOWN, _NOTHING_SEEN)
            if seen is not None:
                yield seen

    def _described(
        self, fd: int, creation: CreationTuple, known: dict[int, _Known]
    ) -> Observation | None:
        if fd in self._open_sockets.detached:
            answer = self._probe_detached(fd)
        else:
            with Probing(creation):
                answer = self._probe_object(fd, creation, known.get(creation[SERIAL]))
        return None if answer is None else self._make_observation(fd, creation, answer, known)

    def _probe_object(
        self, fd: int, creation: CreationTuple, before: _Known | None
    ) -> _Answer | None:
        sock = creation[SOCK]()
        if sock is None:
            return None
        shown, events = None if before is None else before.result, self._events.get(fd, 0)
        began = now()
        result = self._probe.probe_socket(sock, fd, events, shown)
        ended = now()
        if result is None:
            return None
        if before is not None and before.result.connection in _ENDED:
            return result, before.endpoint, began, ended
        return result, endpoint_of(sock, fd), began, ended

    def _probe_detached(self, fd: int) -> _Answer | None:
        """Probe a descriptor that has left its socket object."""
        try:
            with duplicate_fd(fd) as sock:
                copy, began = sock.fileno(), now()
                result = self._probe.probe_socket(sock, copy, self._events.get(fd, 0))
                return result and (result, endpoint_of(sock, copy), began, now())
        except OSError as error:
            if interrupts(error) or error.errno not in _NOTHING_TO_PROBE:
                raise
            return None

    def _make_observation(
        self, fd: int, creation: CreationTuple, answer: _Answer, known: dict[int, _Known]
    ) -> Observation:
        result, endpoint, began, ended = answer
        serial, close_called = creation[SERIAL], fd in self._open_sockets.close_called
        is_copy = fd in self.copies and self._forked_copies.is_unused(result)
        # Not earlier: another scan may have come in since this one began.
        before = known.get(serial)
        if before is None:
            record = self._makers.record_of(creation, fd, self._source.pid)
            at_most = 0.0 if is_copy else self._at_most(creation, record, result)
            age = update_age(result, close_called, None, at_most, ended)
            known[serial] = _Known(record, endpoint, age, result)
        else:
            record, _, age_before, _ = before
            age = update_age(result, close_called, age_before, 0.0, ended)
            if age is not age_before and age_before.seen_at <= ended:
                known[serial] = _Known(record, endpoint, age, result)
        self.described.add(serial)
        if fd in self._open_sockets.detached and record.opener.origin is not Origin.NATIVE:
            record = replace(record, origin=Origin.DETACHED, parent=record)
        suspicious_for = suspect_for(result, age, began, self.copies[fd] if is_copy else None)
        # What has been read in parts is read on, as long as the latest is not too long ago.
        is_read_slowly = (
            close_called and age.has_read and (suspicious_for or 0.0) <= self._age_warning
        )
        return make_observation(
            record,
            fd,
            endpoint,
            result,
            peer_closed_for(result, age, began),
            suspicious_for,
            close_called=close_called,
            in_use=is_read_slowly or fd in self._in_use,
            is_lower_bound=age.is_bound and result.connection is Connection.PEER_CLOSED,
            unanswered=self._unanswered.get(fd),
        )

    def _at_most(self, creation: CreationTuple, record: SocketRecord, result: ProbeResult) -> float:
        """For how long a connection can have been ended that no scan has seen so before."""
        was_scanned = creation[SERIAL] <= self._last_scan.last_serial
        # By the program's clock, which a test may have set to any time.
        opened_for = None if record.opened_at is None else self._wall - record.opened_at
        return longest_possible(result, was_scanned, self.time.at - self._last_scan.at, opened_for)


class SocketScanner:
    """Scans the sockets that the registry knows, and those that no object is known for.

    Attributes:
        attribution: Records where native code opens sockets.
    """

    def __init__(self, registry: Registry, probe: Probe, settings: Settings) -> None:
        self._grace = settings.grace
        self.natives = NativeSockets(registry)
        self._depth = settings.stack_depth
        self.attribution = CallAttribution(self.natives, self._depth)
        self._tracked_scanner = Scanner(registry, probe, settings, registry.made_at)
        self._native_scanner = Scanner(self.natives, probe, settings, registry.made_at)
        self.forked_copies = self._tracked_scanner.forked_copies

    @property
    def notes(self) -> tuple[str, ...]:
        """What the latest scan could not tell."""
        scanners = (self._tracked_scanner, self._native_scanner)
        unknown = (note for each in scanners for note in each.unanswered.notes)
        return (*self.forked_copies.notes, *unknown)

    def share_natives(self, other: SocketScanner) -> None:
        """Know of native sockets what another scanner of the same registry knows."""
        self.natives, self._native_scanner = other.natives, other._native_scanner
        self.attribution = CallAttribution(self.natives, self._depth)

    def take_census(self) -> None:
        """Record the native sockets that are open by now, so that later ones are known as new."""
        self.natives.open_sockets(thorough=True)

    def scan(self, *, full: bool = False, opened_after: int | None = None) -> ScanResult:
        """One scan of all of them; for the arguments see `Scanner.scan`."""
        self.attribution.refresh()
        tracked = self._tracked_scanner.scan(full=full, opened_after=opened_after)
        natives = self._native_scanner.scan(full=full, opened_after=opened_after)
        if opened_after is not None:
            natives = natives.only(_concerns_program)
        if natives.suspects:
            natives = self._without_passing(natives, self._grace if opened_after is None else 0.0)
        return tracked.with_natives(natives)

    def _without_passing(self, natives: ScanResult, grace: float) -> ScanResult:
        """Without those that close by themselves; waits for new ones that would be leaks."""
        ended = [seen for seen in natives.suspects if (seen.suspect_for or 0.0) >= grace]
        for wait in _WAITS:
            if not any(not _is_live(seen) and self.natives.is_new(seen) for seen in ended):
                break
            pause(wait)
        return natives.only(lambda seen: _is_live(seen) or self.natives.is_still(seen))

    def close(self) -> None:
        """Remove the wrappers of `attribute`."""
        self.attribution.undo()

    def after_fork(self) -> None:
        """In the child: the sockets known so far are inherited ones."""
        self.natives.after_fork()
        self._tracked_scanner.after_fork()
        self._native_scanner.after_fork()


def _concerns_program(seen: Observation) -> bool:
    """Whether a native socket concerns the program: its call is known, or its connection has ended.

    Native code may open sockets that it keeps, in any thread, at any time.
    """
    return bool(seen.record.stack) or not _is_live(seen)


def _is_live(seen: Observation) -> bool:
    return seen.connection not in _ENDED


# Each is twice as long as the one before; together they are as long as `SETTLED_AFTER`.
_WAITS = [SETTLED_AFTER / 2**number for number in range(10, 0, -1)]
