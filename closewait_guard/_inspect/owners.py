"""What is seen of owners that should have been closed, and of connections not given back to a pool.

Owners are sessions, clients and event loops: what is meant to be closed and has sockets.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

from closewait_guard import _libraries
from closewait_guard._capture import (
    SOCK,
    EndedOwner,
    OpenCheckout,
    OpenOwner,
    OwnedSocket,
    OwnerTable,
    Registry,
)
from closewait_guard._clock import wall
from closewait_guard._cpython import LOOP_CLOSED, threads
from closewait_guard._format import pluralize
from closewait_guard._inspect.observation import ScanResult, SeenOwner, make_observation
from closewait_guard._inspect.probe import (
    Endpoint,
    Probe,
    ProbeResult,
    address_text,
    duplicate_fd,
    endpoint_of,
    peer_of,
)
from closewait_guard._inspect.records import group_by_line, record_of
from closewait_guard._libraries import HandleClasses, OwnerKind, descriptor_of, handle_classes
from closewait_guard._live import (
    field,
    is_too_large,
    plain_of,
    unfinished_tasks,
)
from closewait_guard.model import (
    Checkout,
    Connection,
    Evidence,
    FullPool,
    Observation,
    Origin,
    SocketOwner,
    SocketRecord,
    State,
)
from closewait_guard.settings import Settings

__all__ = [
    "CheckoutScanner",
    "OwnerScanner",
]


# Besides one for each thread and each task that has not finished.
_FEW = 4
_TOO_LARGE = "whether clients of one line are more than it needs: the program has too many objects"


class OwnerScanner:
    """Describes the owners that should have been closed, each that has ended once.

    Attributes:
        notes: What could not be found out the last time.
        lost: How many were not closed whose records are gone; empty if there are none.
        unasked: Why what the latest block or test has left open may be missing.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._ended: dict[int, SeenOwner] = {}
        self.notes: tuple[str, ...] = ()
        self.lost = ""
        self.unasked: tuple[str, ...] = ()

    def scan(
        self, seen: ScanResult, opened_after: int | None, *, may_stay_open: bool
    ) -> ScanResult:
        """What was seen of the sockets, with owners in the place of those that they should close.

        Args:
            seen: What was seen of the sockets.
            opened_after: A mark; of an owner that is older, the sockets stand for themselves.
            may_stay_open: Whether sockets may: at the end of a block those of owners that are
                there still are reported by themselves, except those of C code, which have no
                record: their owner stands for them.
        """
        table, self.notes = self._registry.owners, self._registry.declared.failed
        failed = Counter[str]()
        if table is None:
            return seen
        ended = {each.serial: each for each in table.ended.copy()}
        kept = [each for each in ended.values() if each.is_left_to_exit]
        known = self._ended
        self._ended = {
            serial: known.get(serial) or self._describe_ended(each)
            for serial, each in ended.items()
            if not each.is_left_to_exit
        }
        self.lost = _describe_lost(table.forgotten)
        self.notes += (self.lost,) if self.lost else ()
        found = [*self._ended.values()]
        if may_stay_open:
            owners = table.open_owners()
            found += [*self._unusable(table, owners, failed), *self._surplus(table, owners, seen)]
            self.notes += _describe_failed(failed)
        elif opened_after is not None:
            found += self._native(table, seen, opened_after, failed)
            # Of others, their sockets stand for them. One that cannot be asked is counted above.
            owners, also_failed = table.unrecorded(opened_after), Counter[str]()
            found += [each for each in self._unusable(table, owners, also_failed) if not each.fds]
            failed |= also_failed
            self.unasked = _describe_failed(failed)
        return seen.with_owners(
            [each for each in found if opened_after is None or each.serial > opened_after],
            frozenset[int]().union(*(each.serials for each in kept)),
        )

    def _describe_ended(self, ended: EndedOwner) -> SeenOwner:
        evidence = Evidence.COLLECTED if ended.collected else Evidence.FINALIZED
        return self._describe(ended, ended.sockets, ended.descriptors, evidence)

    def _unusable(
        self,
        table: OwnerTable,
        owners: Iterable[tuple[object, OpenOwner]],
        failed: Counter[str],
    ) -> Iterator[SeenOwner]:
        """Those whose event loop is closed."""
        for owner, entry in owners:
            with self._counting_failures(entry, failed):
                if field(entry.kind.loop(owner), LOOP_CLOSED) is True:
                    found = self._describe_open(table, owner, entry)
                    yield from [found] if found.has_any else ()

    def _native(
        self, table: OwnerTable, seen: ScanResult, opened_after: int, failed: Counter[str]
    ) -> Iterator[SeenOwner]:
        """Those that a block has made and that have sockets of C code, which have no own record."""
        known = {each.fd for each in seen.opened_after(opened_after)}
        for made, entry in table.unrecorded(opened_after, native=True):
            with self._counting_failures(entry, failed):
                found = table.sockets_of(made, entry.kind)
                native = [each for each in found if each.serial is None and each.fd not in known]
                if native:
                    owner = self._describe(entry, native, {}, Evidence.OPEN_OWNER)
                    # By which the pool is found that it waits in.
                    yield owner._replace(observation=replace(owner.observation, fd=native[0].fd))

    @contextmanager
    def _counting_failures(self, entry: OpenOwner, failed: Counter[str]) -> Iterator[None]:
        """One may be in the middle of something: it is asked again the next time."""
        try:
            yield
        except Exception:
            site = record_of(entry.creation, self._registry.pid).site
            failed[f"{entry.kind.name} opened at {site.call}" if site else entry.kind.name] += 1

    def _surplus(
        self, table: OwnerTable, owners: Iterable[tuple[object, OpenOwner]], seen: ScanResult
    ) -> Iterator[SeenOwner]:
        """Those that one line has made beyond what can use them, and that do nothing now."""
        by_kind = defaultdict[object, list[tuple[object, OpenOwner]]](list)
        for each in owners:
            by_kind[each[1].kind].append(each)
        # Without a line, nothing shows that they have one in common.
        alike = [
            group_by_line((each, each[1].creation) for each in found) for found in by_kind.values()
        ]
        many = [group for groups in alike for group in groups if len(group) > _FEW]
        if not many:
            return
        busy = _threads_besides(owners)
        many = [group for group in many if len(group) > busy + _FEW]
        if many and is_too_large():
            self.notes += (_TOO_LARGE,)
        elif many:
            needed = busy + _FEW + unfinished_tasks()
            suspects = {each.fd for each in seen.suspects}
            for group in many:
                yield from self._surplus_in(table, group, needed, suspects)

    def _surplus_in(
        self,
        table: OwnerTable,
        group: list[tuple[object, OpenOwner]],
        needed: int,
        suspects: Set[int],
    ) -> Iterator[SeenOwner]:
        """Of those that one line has made: they may be for one address or purpose each."""
        alike = defaultdict[object, dict[object, SeenOwner]](dict)
        for owner, entry in group:
            with suppress(Exception):
                found = self._describe_open(table, owner, entry, is_surplus=entry.kind.is_surplus)
                # A connection whose peer has closed is reported for that.
                is_own_cause = found.fds.isdisjoint(suspects)
                has_reason = found.has_any or not entry.kind.is_surplus
                if is_own_cause and has_reason and entry.kind.is_idle(owner):
                    purpose = _peers_of(found), plain_of(entry.kind.purpose(owner))
                    alike[purpose][found.fds or object()] = found  # With the same sockets: one.
        for some in alike.values():
            yield from some.values() if len(some) > needed else ()

    def _describe_open(
        self, table: OwnerTable, owner: object, entry: OpenOwner, *, is_surplus: bool = False
    ) -> SeenOwner:
        sockets = list(table.sockets_of(owner, entry.kind))
        descriptors = Counter(kind.value for kind, _ in entry.kind.descriptors(owner))
        return self._describe(entry, sockets, descriptors, Evidence.OWNER, is_surplus=is_surplus)

    def _describe(
        self,
        entry: OpenOwner | EndedOwner,
        sockets: Sequence[OwnedSocket],
        descriptors: Mapping[str, int],
        evidence: Evidence,
        *,
        is_surplus: bool = False,
    ) -> SeenOwner:
        peers = dict.fromkeys(text for each in sockets if (text := address_text(each.peer)))
        owner = SocketOwner(
            entry.kind.name, len(sockets), tuple(peers), is_surplus, dict(descriptors)
        )
        record = record_of(entry.creation, self._registry.pid)
        return SeenOwner(
            _observe(record, entry.kind, owner, evidence),
            frozenset(each.serial for each in sockets if each.serial is not None),
            frozenset(each.fd for each in sockets),
        )


def _describe_failed(failed: Counter[str]) -> tuple[str, ...]:
    return tuple(f"looking at {number} {name} has failed" for name, number in failed.items())


def _threads_besides(owners: Iterable[tuple[object, OpenOwner]]) -> int:
    """How many threads there are that are not an owner's own."""
    alive = set(map(id, threads.copy().values()))
    for owner, entry in owners:
        with suppress(Exception):
            alive -= set(map(id, entry.kind.threads(owner)))
    return len(alive)


def _describe_lost(number: int) -> str:
    if not number:
        return ""
    which = f"{pluralize(number, 'unclosed object')} {'was' if number == 1 else 'were'}"
    return f"where {which} made: no record is left"


def _peers_of(found: SeenOwner) -> tuple[str, ...]:
    return found.observation.owner.peers if found.observation.owner is not None else ()


def _observe(
    record: SocketRecord, kind: OwnerKind, owner: SocketOwner, evidence: Evidence
) -> Observation:
    return Observation(
        record=record,
        fd=-1,
        inode=None,
        family="owner",
        type=kind.holder,
        local=None,
        peer=None,
        state=State.NONE,
        evidence=evidence,
        peer_closed_for=None,
        unread=None,
        last_sent_for=None,
        last_received_for=None,
        tls=False,
        close_called=False,
        connection=Connection.NOT_APPLICABLE,
        owner=owner,
    )


class _Out(NamedTuple):
    """A connection that is out of its pool: where it was taken, and its descriptor, if any.

    Attributes:
        may_last: It was taken by a call that may wait for any time, and gives it back itself.
        is_busy: Such a call waits for an answer on it now.
    """

    record: SocketRecord
    checkout: Checkout
    fd: int | None
    may_last: bool
    is_busy: bool


class CheckoutScanner:
    """Describes the connections that were taken from pools and not given back.

    Attributes:
        full_pools: The pools that had no connection left at the latest scan.
    """

    def __init__(self, registry: Registry, probe: Probe, settings: Settings) -> None:
        self._registry = registry
        self._probe = probe
        self._grace = settings.checkout_grace
        self.full_pools: tuple[FullPool, ...] = ()

    def scan(self, seen: ScanResult, opened_after: int | None) -> ScanResult:
        """What was seen of the sockets, with where they were taken; and what is out for too long.

        Args:
            seen: What was seen of the sockets.
            opened_after: A mark: all that was taken after it counts as out for too long.
        """
        table = self._registry.owners
        taken = [] if table is None else table.checkouts.open_checkouts()
        self.full_pools = ()
        if not taken:
            return seen
        pools = defaultdict[int, list[OpenCheckout]](list)
        for each in taken:
            pools[id(each.pool)].append(each)
        groups = list(pools.values())
        if opened_after is None and not seen.suspects:
            # Of a pool of which nothing is to be said, no connection is looked at.
            groups = [group for group in groups if self._is_of_interest(group)]
        handles = handle_classes(_libraries.LIBRARIES, with_inner=True) if groups else {}
        out = [found for group in groups for found in self._describe(group, handles)]
        seen = seen._replace(suspects=tuple(_taken_from(out, seen.suspects)))
        found = {
            each.fd
            for each in seen.suspects
            if each.checkout is not None
            and (opened_after is None or each.record.serial > opened_after)
        }
        left = [each for each in out if each.fd is None or each.fd not in found]
        left = [each for each in left if self._is_out_too_long(each, opened_after)]
        unanswered = {each.fd: each.unanswered for each in seen.suspects}
        observed = [each for each in map(self._observe, left) if each is not None]
        if opened_after is None:
            observed = [each for each in observed if not self._is_in_use(each)]
        observed = [replace(each, unanswered=unanswered.get(each.fd)) for each in observed]
        theirs = {each.fd for each in observed if each.fd >= 0}
        return seen._replace(
            suspects=tuple(each for each in seen.suspects if each.fd not in theirs)
            + tuple(observed),
            healthy=tuple(each for each in seen.healthy if each.fd not in theirs),
        )

    def _is_of_interest(self, taken: list[OpenCheckout]) -> bool:
        """Whether one is out for too long, or all that there may be are out."""
        with suppress(Exception):
            most = taken[0].kind.max_size(taken[0].pool)
            is_full = most is not None and len(taken) >= most
            return is_full or wall() - taken[0].taken_at >= self._grace
        return False

    def _is_out_too_long(self, out: _Out, opened_after: int | None) -> bool:
        if opened_after is None:
            return out.checkout.seconds >= self._grace and not (out.may_last or out.is_busy)
        # What has no socket is not the concern of a block or a test.
        return out.record.serial > opened_after and out.fd is not None and not out.is_busy

    def _is_in_use(self, seen: Observation) -> bool:
        """Whether anything was sent on a connection lately, or received and read."""
        times = (seen.last_sent_for, None if seen.unread else seen.last_received_for)
        return any(each is not None and each < self._grace for each in times)

    def _describe(self, taken: list[OpenCheckout], handles: HandleClasses) -> Iterator[_Out]:
        """What is out of one pool. One may be in the middle of something: it is passed over."""
        at, pool, kind = wall(), taken[0].pool, taken[0].kind
        with suppress(Exception):
            name, most = kind.name(pool), kind.max_size(pool)
            found = []
            for each in taken:
                record = record_of(each.creation, self._registry.pid)
                seconds = max(0.0, at - each.taken_at)
                checkout = Checkout(kind.library, name, len(taken), most, seconds)
                entry = each.creation[SOCK]()
                if entry is None:
                    continue
                fd = descriptor_of(kind.connection(entry), handles)[0]
                may_last = any(frame.function.startswith(kind.may_last) for frame in record.stack)
                fd = None if fd is None or fd < 0 else fd
                found.append(_Out(record, checkout, fd, may_last, kind.is_busy(entry)))
            if most is not None and len(taken) >= most:
                self.full_pools += (_full_pool(name, most, found),)
            yield from found

    def _observe(self, out: _Out) -> Observation | None:
        """One that was not seen among the suspects; None if it is closed by now."""
        endpoint, result, fd = Endpoint("pool", "", None, None), _NO_SOCKET, -1
        if out.fd is not None:
            try:
                with duplicate_fd(out.fd) as sock:
                    copy = sock.fileno()
                    endpoint = endpoint_of(sock, copy)
                    result = self._probe.probe_socket(sock, copy, 0) or _NO_SOCKET
                    fd = out.fd
            except OSError:
                return None
        seen = make_observation(
            out.record, fd, endpoint, result, result.fin_for, out.checkout.seconds
        )
        return replace(seen, checkout=out.checkout)


_NO_SOCKET = ProbeResult(State.NONE, Evidence.POLL, Connection.NOT_APPLICABLE)
_ENDED = (Connection.PEER_CLOSED, Connection.GONE)


def _taken_from(out: Iterable[_Out], suspects: Iterable[Observation]) -> Iterator[Observation]:
    """Connections that have ended, each with where it was taken from its pool, if it was."""
    by_fd = {each.fd: each for each in out}
    for seen in suspects:
        taken = by_fd.get(seen.fd)
        is_inherited = seen.record.origin is Origin.INHERITED
        if taken is None or seen.connection not in _ENDED or is_inherited or seen.close_called:
            yield seen
        else:
            record = replace(taken.record, serial=seen.record.serial, parent=seen.record)
            yield replace(seen, record=record, checkout=taken.checkout)


def _full_pool(name: str, most: int, out: list[_Out]) -> FullPool:
    ages = [each.checkout.seconds for each in out]
    sites = [each.record.site for each in out]
    places = Counter(site.place if site is not None else "an unknown place" for site in sites)
    peers = {peer for each in out if each.fd is not None and (peer := _peer_at(each.fd))}
    where = f" to {peers.pop()}" if len(peers) == 1 else ""
    return FullPool(f"{name}{where}", most, min(ages), max(ages), dict(places.most_common()))


def _peer_at(fd: int) -> str | None:
    with suppress(OSError), duplicate_fd(fd) as sock:
        return peer_of(sock)
    return None
