"""What is seen of owners: those that ended without their close, and those that nothing can close.

Owners are sessions, clients and event loops: what is meant to be closed and has sockets.
"""

from __future__ import annotations

import _socket
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress

from closewait_guard._capture import (
    STACK,
    EndedOwner,
    OpenOwner,
    Registry,
    intern,
    sockets_of,
)
from closewait_guard._cpython import LOOP_CLOSED, threads
from closewait_guard._format import pluralize
from closewait_guard._inspect.observation import ScanResult, SeenOwner
from closewait_guard._inspect.probe import address_text, peer_of
from closewait_guard._inspect.records import record_of
from closewait_guard._live import field, find_classes, instances_of, is_too_large
from closewait_guard.model import (
    Connection,
    Evidence,
    Observation,
    SocketOwner,
    SocketRecord,
    State,
)

__all__ = [
    "OwnerScanner",
]


# Besides one for each thread and each task.
_FEW = 4
_TASKS = ("_asyncio:Task", "asyncio.tasks:_PyTask", "trio._core._run:Task", "greenlet:greenlet")
_TOO_LARGE = "whether clients of one line are more than it needs: the program has too many objects"


class OwnerScanner:
    """Describes the owners that should have been closed, each that has ended once.

    Attributes:
        notes: What could not be found out the last time.
        lost: How many were not closed whose records are gone; empty if there are none.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._ended: dict[int, SeenOwner] = {}
        self.notes: tuple[str, ...] = ()
        self.lost = ""

    def scan(
        self, seen: ScanResult, opened_after: int | None, *, may_stay_open: bool
    ) -> ScanResult:
        """What was seen of the sockets, with owners in the place of those that they should close.

        Args:
            seen: What was seen of the sockets.
            opened_after: A mark; of an owner that is older, the sockets stand for themselves.
            may_stay_open: Whether sockets may: at the end of a block those of owners that are
                there still are reported by themselves.
        """
        table = self._registry.owners
        if table is None:
            return seen
        ended = {each.serial: each for each in table.ended.copy()}
        known = self._ended
        self._ended = {
            serial: known.get(serial) or self._describe_ended(each)
            for serial, each in ended.items()
        }
        self.lost = _describe_lost(table.forgotten)
        self.notes = (self.lost,) if self.lost else ()
        found = [*self._ended.values()]
        if may_stay_open:
            owners = table.open_owners()
            found += [*self._unusable(owners), *self._surplus(owners, seen)]
        return seen.with_owners(
            [each for each in found if opened_after is None or each.serial > opened_after]
        )

    def _describe_ended(self, ended: EndedOwner) -> SeenOwner:
        evidence = Evidence.COLLECTED if ended.collected else Evidence.FINALIZED
        record = record_of(ended.creation, self._registry.pid)
        peers = [text for each in ended.peers if (text := address_text(each))]
        observation = _observe(record, ended, peers, len(ended.sockets), evidence)
        return SeenOwner(observation, ended.serials)

    def _unusable(self, owners: Iterable[tuple[object, OpenOwner]]) -> Iterator[SeenOwner]:
        """Those whose event loop is closed."""
        for owner, entry in owners:
            # One may be in the middle of something; it is asked again the next time.
            with suppress(Exception):
                if field(entry.kind.loop(owner), LOOP_CLOSED) is True:
                    found = self._describe_open(owner, entry)
                    yield from [found] if found.sockets else ()

    def _surplus(
        self, owners: Iterable[tuple[object, OpenOwner]], seen: ScanResult
    ) -> Iterator[SeenOwner]:
        """Those that one line has made beyond what can use them, and that do nothing now."""
        alike: dict[object, list[tuple[object, OpenOwner]]] = defaultdict(list)
        for owner, entry in owners:
            intern(entry.creation[STACK])
            alike[entry.kind, *map(id, entry.creation[STACK])].append((owner, entry))
        needed = len(threads) + _FEW
        many = [group for group in alike.values() if len(group) > needed]
        if not many:
            return
        if is_too_large():
            self.notes += (_TOO_LARGE,)
            return
        needed += len(instances_of(find_classes(_TASKS).values()))
        suspects = {each.record.serial for each in seen.suspects}
        for group in many:
            yield from self._surplus_in(group, needed, suspects)

    def _surplus_in(
        self, group: list[tuple[object, OpenOwner]], needed: int, suspects: Set[int]
    ) -> Iterator[SeenOwner]:
        """Of those that one line has made: they may be for one address each."""
        by_peers: dict[tuple[str, ...], list[SeenOwner]] = defaultdict(list)
        for owner, entry in group:
            with suppress(Exception):
                found = self._describe_open(owner, entry, is_surplus=entry.kind.is_surplus)
                # A connection whose peer has closed is reported for that.
                is_own_cause = bool(found.sockets) and found.sockets.isdisjoint(suspects)
                if is_own_cause and entry.kind.is_idle(owner):
                    by_peers[_peers_of(found)].append(found)
        yield from (each for found in by_peers.values() if len(found) > needed for each in found)

    def _describe_open(
        self, owner: object, entry: OpenOwner, *, is_surplus: bool = False
    ) -> SeenOwner:
        sockets = list(sockets_of(owner, entry.kind))
        record = record_of(entry.creation, self._registry.pid)
        serials = (self._registry.serial_at(_socket.socket.fileno(sock)) for sock in sockets)
        peers = [text for sock in sockets if (text := peer_of(sock))]
        observation = _observe(
            record, entry, peers, len(sockets), Evidence.OWNER, is_surplus=is_surplus
        )
        return SeenOwner(observation, frozenset(each for each in serials if each is not None))


def _describe_lost(number: int) -> str:
    if not number:
        return ""
    which = f"{pluralize(number, 'unclosed object')} {'was' if number == 1 else 'were'}"
    return f"where {which} made: no record is left"


def _peers_of(found: SeenOwner) -> tuple[str, ...]:
    return found.observation.owner.peers if found.observation.owner is not None else ()


def _observe(
    record: SocketRecord,
    entry: OpenOwner | EndedOwner,
    peers: Iterable[str],
    sockets: int,
    evidence: Evidence,
    *,
    is_surplus: bool = False,
) -> Observation:
    return Observation(
        record=record,
        fd=-1,
        inode=None,
        family="owner",
        type=entry.kind.holder,
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
        owner=SocketOwner(entry.kind.name, sockets, tuple(dict.fromkeys(peers)), is_surplus),
    )
