"""Linux: which process has which connection, from /proc and the kernel's tables.

One network namespace is read at a time. Unconnected sockets, and those not of TCP, have no row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from types import MappingProxyType

from closewait_guard._inspect import Endpoint, ProbeResult, has_moved_no_data, is_unused_since
from closewait_guard._inspect.probe import linux as probe
from closewait_guard._processes import procfs
from closewait_guard._processes.model import (
    CLOSE_WAIT,
    ESTABLISHED,
    KEEPALIVE,
    Descriptor,
    Entry,
    Inaccessible,
    Process,
    ProcessSnapshot,
    SharedBy,
    Snapshot,
    UnownedSocket,
    UnusedCopy,
)
from closewait_guard._processes.netlink import Network, network_of
from closewait_guard._threads import WaitingCalls, waiting_calls_of
from closewait_guard.model import Connection, Evidence, State

__all__ = [
    "descendants",
    "take_snapshot",
    "view_of",
]


def take_snapshot(
    pids: Sequence[int] | None,
    *,
    everything: bool,
    at_fork: Mapping[int, bytes] = MappingProxyType({}),
) -> Snapshot:
    """Scan some processes, or all that there are.

    Args:
        pids: The processes; None for all.
        everything: Describe the healthy sockets too.
        at_fork: By inode, `struct tcp_info` as it was at a fork, where that is known.
    """
    processes, inaccessible = _read(procfs.all_pids() if pids is None else pids)
    # Only of a family that was asked for: the kernel is to date all connections for it.
    parents = {} if pids is None else _parents_of(processes)
    networks = _Networks(processes, dated=everything or bool(parents), at_fork=at_fork)
    at = time.monotonic()
    inspected = []
    for process in processes:
        one = networks.sockets_of(process, everything=everything, parent=parents.get(process.pid))
        if not procfs.has_stayed(process):
            inaccessible.append(Inaccessible(process.pid, "", None, exists=False))
        elif one is None:
            inaccessible.append(_inaccessible(process.pid, _NO_NETWORK))
        else:
            inspected.append(one)
    shared_by = _find_shared([one.process for one in inspected], inspected, complete=pids is None)
    if pids is None:
        # Processes end all the time: only who was asked for is missed.
        inaccessible = [each for each in inaccessible if each.exists and each.is_a_loss]
    return Snapshot(
        at,
        [one.snapshot(shared_by) for one in inspected],
        inaccessible,
        list(_unowned(networks, inaccessible, complete=pids is None)),
        hides_processes=pids is None and procfs.are_hidden(),
    )


def descendants(pids: Sequence[int]) -> list[int]:
    """The processes, with all those that they have started, and so on."""
    children: dict[int, list[int]] = {}
    for pid, parent in procfs.parents():
        children.setdefault(parent, []).append(pid)
    found = dict.fromkeys(pids)
    waiting = list(found)
    while waiting:
        children_of = [pid for pid in children.get(waiting.pop(), ()) if pid not in found]
        found |= dict.fromkeys(children_of)
        waiting += children_of
    return list(found)


def _parents_of(processes: Sequence[Process]) -> dict[int, Process]:
    """By the number of a process, its parent, if it has sockets that the parent has not."""
    known = {process.pid: process for process in processes}
    return {
        process.pid: parent
        for process in processes
        if (parent := known.get(process.parent)) is not None and not parent.owned >= process.owned
    }


_NO_NETWORK = "is in a network namespace that cannot be inspected"


def _read(pids: Iterable[int]) -> tuple[list[Process], list[Inaccessible]]:
    found, inaccessible = [], []
    for pid in dict.fromkeys(pids):
        try:
            found.append(procfs.read(pid))
        except ProcessLookupError:
            inaccessible.append(Inaccessible(pid, "", None, exists=procfs.is_hidden(pid)))
        except PermissionError:
            inaccessible.append(_inaccessible(pid))
        except procfs.HasNoDescriptorsError as error:
            inaccessible.append(_inaccessible(pid, str(error))._replace(is_a_loss=False))
        except OSError as error:
            inaccessible.append(_inaccessible(pid, f"cannot be looked into: {error.strerror}"))
    return found, inaccessible


def _inaccessible(pid: int, why: str = "") -> Inaccessible:
    """With what may be known of the process all the same."""
    program, uid = "", None
    with suppress(OSError):
        uid = procfs.user_of(pid)
        program = procfs.program(pid)
    exists = uid is not None or procfs.is_hidden(pid)
    return Inaccessible(pid, program, uid, exists=exists, why=why)


class _Networks:
    """The networks that processes live in, each asked once."""

    def __init__(
        self, processes: Sequence[Process], *, dated: bool, at_fork: Mapping[int, bytes]
    ) -> None:
        self._at_fork = at_fork
        own = procfs.namespace_of("self")
        self._namespaces = {each.pid: procfs.namespace_of(each.pid) for each in processes}
        residents: dict[int | None, list[Process]] = {own: []}
        for process in processes:
            residents.setdefault(self._namespaces[process.pid], []).append(process)
        wanted = set[int]().union(*(process.owned for process in processes))
        self._networks = {
            namespace: network_of(
                namespace,
                ["self"] if namespace == own else [process.pid for process in living],
                wanted,
                dated=dated,
            )
            for namespace, living in residents.items()
        }
        # A process that has gone into another network has sockets of the one before.
        found = [network for network in self._networks.values() if network is not None]
        rows = {inode: row for network in found for inode, row in network.rows.items()}
        for network in found:
            network.rows = rows
        self.own = self._networks[own]

    def sockets_of(
        self, process: Process, *, everything: bool, parent: Process | None
    ) -> _ProcessSockets | None:
        """One process's sockets; None where its network cannot be looked at."""
        network = self._networks[self._namespaces[process.pid]]
        if network is None:
            return None
        found = _ProcessSockets(process, network, everything)
        if parent is not None:
            found.take_copies(_unused_copies(process, parent, network, self._at_fork))
        return found


class _ProcessSockets:
    """One process's sockets, sorted."""

    def __init__(self, process: Process, network: Network, everything: bool) -> None:
        self.states: Counter[str] = Counter()
        self.ended: list[Descriptor] = []
        self._others: list[Descriptor] = []
        self.copies: list[UnusedCopy] = []
        self.process = process
        self._network = network
        without_row, rows = procfs.SocketsWithoutRow(process), network.rows
        numbers = Counter[int]()
        for fd, inode in process.sockets.items():
            row = rows.get(inode)
            if row is None:
                self._take_without_row(without_row, fd, inode, everything)
                continue
            state = row[1]
            numbers[state] += 1
            if state == CLOSE_WAIT:
                self.ended.append(_descriptor(fd, Entry(*row), network))
            elif everything:
                self._others.append(_descriptor(fd, Entry(*row), network))
        for number, times in numbers.items():
            self.states[_state_of(number)] += times

    def take_copies(self, copies: Iterable[UnusedCopy]) -> None:
        """These are to be judged as copies, whatever their peers have done."""
        self.copies = list(copies)
        numbers = {copy.descriptor.fd for copy in self.copies}
        self.ended = [each for each in self.ended if each.fd not in numbers]

    def _take_without_row(
        self, without_row: procfs.SocketsWithoutRow, fd: int, inode: int, everything: bool
    ) -> None:
        protocol = without_row.protocol(fd, inode)
        if protocol is None:
            return
        found = without_row.unconnected(fd, inode, protocol)
        self.states[found.view.state if found else protocol.partition("-")[0]] += 1
        if found:
            self.ended.append(found)
        elif everything:
            self._others.append(without_row.describe(fd, inode, protocol))

    def snapshot(self, shared_by: Mapping[int, Sequence[SharedBy]]) -> ProcessSnapshot:
        return ProcessSnapshot(
            self.process,
            self.states,
            self.ended,
            self._others,
            shared_by,
            *self._backlog(),
            self._network.dated,
            self.copies,
        )

    def _backlog(self) -> tuple[Counter[str], Counter[str]]:
        """What waits at listeners of this process, and what may wait at one of another instead."""
        own = set(self.process.sockets.values())
        certain, uncertain = Counter[str](), Counter[str]()
        for entry in self._network.others_in_close_wait:
            if entry.inode == 0:
                listeners = self._network.listeners_for(entry)
                if not own.isdisjoint(listeners):
                    (certain if own >= listeners else uncertain)[entry.local] += 1
        return certain, uncertain


def _state_of(number: int) -> State:
    return probe.STATES[number] if number < len(probe.STATES) else State.NONE


def _descriptor(fd: int, entry: Entry, network: Network) -> Descriptor:
    """A table's entry as one process has it."""
    endpoint = Endpoint(entry.family_name, "SOCK_STREAM", entry.local, entry.peer, entry.inode)
    return Descriptor(fd, endpoint, view_of(entry), network.is_accepted(entry))


# The shortest time after which a probe is sent: the one that was chosen does not show.
_MIN_KEEPALIVE_IDLE = 1.0


def view_of(entry: Entry) -> ProbeResult:
    """The entry as a probe would have seen it."""
    if entry.info is not None:
        result = probe.tcp_result(entry.info, lambda: entry.unread, lambda: entry.unsent)
        if entry.timer == KEEPALIVE:
            return probe.bounded_by_keepalive(result, _MIN_KEEPALIVE_IDLE)
        return result
    state = _state_of(entry.state)
    return ProbeResult(
        state,
        Evidence.TABLE,
        probe.CONNECTIONS.get(state, Connection.LIVE),
        unread=entry.unread,
        unsent=entry.unsent,
    )


def _unused_copies(
    process: Process, parent: Process, network: Network, at_fork: Mapping[int, bytes]
) -> Iterator[UnusedCopy]:
    """What came over fork() and the parent has closed, as far as no byte has passed since.

    Those whose peers have closed only where their state at the fork is known.
    """
    age, calls = procfs.age_of(process, network.at), None
    unused, peers_of_served = list[tuple[Entry, UnusedCopy]](), set[tuple[bytes, bytes]]()
    for fd, entry in _left_to(process, parent, network):
        found = _descriptor(fd, entry, network)
        is_unused = is_unused_since(found.view, age) or has_moved_no_data(
            at_fork.get(entry.inode, b""), entry.info or b"", entry.received
        )
        calls = calls or (_calls_of(process.pid) if is_unused else None)
        # A child may take over what the parent has accepted and not answered.
        is_new = found.accepted and not entry.has_sent
        if calls is not None and is_unused and fd not in calls.fds:
            unused.append((entry, UnusedCopy(found, age, calls.may_use_others or is_new)))
        if is_new or not unused or unused[-1][0] is not entry:
            peers_of_served.add((entry.peer_port, entry.local_port))
    for entry, copy in unused:
        # Only the child itself may wait for the end of this one.
        is_own_client = (entry.local_port, entry.peer_port) in peers_of_served
        yield copy._replace(may_be_used=copy.may_be_used or is_own_client)


def _left_to(process: Process, parent: Process, network: Network) -> Iterator[tuple[int, Entry]]:
    """The connections of a process that its parent has not open."""
    for fd, inode in process.sockets.items():
        row = network.rows.get(inode)
        # A program that is started on a connection has it as 0, 1 or 2.
        if row is not None and row[1] in _CONNECTED and inode not in parent.owned and fd > 2:
            yield fd, Entry(*row)


_CONNECTED = frozenset({ESTABLISHED, CLOSE_WAIT})


def _calls_of(pid: int) -> WaitingCalls:
    try:
        return waiting_calls_of(pid)
    except OSError:
        return WaitingCalls(set(), may_use_others=True)


def _find_shared(
    processes: Sequence[Process], inspected: Iterable[_ProcessSockets], *, complete: bool
) -> dict[int, list[SharedBy]]:
    """Who has the ended sockets open, in whatever process that may be looked into."""
    ended = [each for one in inspected for each in one.ended]
    if not ended:
        return {}
    # A fork's copy keeps the number; a program that is started on a socket has it as 0, 1 or 2.
    likely = frozenset({0, 1, 2, *(each.fd for each in ended)})
    open_in: dict[int, Mapping[int, int]] = {process.pid: process.sockets for process in processes}
    if not complete:
        open_in |= procfs.some_sockets_of(set(procfs.all_pids()) - open_in.keys(), likely)
    times = Counter(chain.from_iterable(sockets.values() for sockets in open_in.values()))
    inodes = {inode for each in ended if times[inode := each.endpoint.inode or 0] > 1}
    found: dict[int, list[SharedBy]] = {}
    for pid, sockets in open_in.items() if inodes else ():
        matching = {fd: inode for fd, inode in sockets.items() if inode in inodes}
        with suppress(OSError):
            program = procfs.program(pid) if matching else ""
            for fd, inode in matching.items():
                found.setdefault(inode, []).append(SharedBy(pid, program, fd))
    return {inode: shared_by for inode, shared_by in found.items() if len(shared_by) > 1}


def _unowned(
    networks: _Networks, inaccessible: Sequence[Inaccessible], *, complete: bool
) -> Iterator[UnownedSocket]:
    """Sockets in CLOSE_WAIT of those who may not be looked into, or are not to be seen."""
    users = {each.uid for each in inaccessible if each.exists and each.is_a_loss}
    network = networks.own
    if network is None:
        return
    for entry in network.others_in_close_wait:
        if entry.inode and (complete or entry.uid in users):
            yield UnownedSocket(entry.uid, _descriptor(-1, entry, network))
