"""Linux: which process has which connection, from /proc and the kernel's tables.

One network namespace is read at a time. Unconnected sockets, and those not of TCP, have no row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing, suppress
from itertools import chain

from closewait_guard._inspect import Endpoint, ProbeResult, is_unused_since
from closewait_guard._inspect.probe import linux as probe
from closewait_guard._processes import netlink, procfs
from closewait_guard._processes.model import (
    CLOSE_WAIT,
    ESTABLISHED,
    KEEPALIVE,
    LISTEN,
    Descriptor,
    Entry,
    Inaccessible,
    Process,
    ProcessSnapshot,
    Row,
    SharedBy,
    Snapshot,
    UnownedSocket,
    UnusedCopy,
)
from closewait_guard._processes.procfs import namespace_of
from closewait_guard._threads import WaitingCalls, waiting_calls_of
from closewait_guard.model import Connection, Evidence, State

__all__ = [
    "Network",
    "descendants",
    "network_of",
    "take_snapshot",
    "view_of",
]


# All in which a program can have a socket: not TIME_WAIT, SYN_RECV and NEW_SYN_RECV, which are the
# kernel's own. The closed and unconnected are in no table.
_OPEN = sum(1 << number for number in (1, 2, LISTEN))
_ENDING = sum(1 << number for number in (4, 5, 9, 11))


class Network:
    """Connections by inode.

    Args:
        wanted: The inodes that matter.
        dated: The kernel says when the peers have closed.

    Attributes:
        rows: Of the wanted sockets.
        at: When those that are up were read, by the clock that dates the start of processes.
        others_in_close_wait: In CLOSE_WAIT, and not of the wanted.
    """

    def __init__(self, wanted: Set[int], *, dated: bool) -> None:
        self.rows: dict[int, Row] = {}
        self.at = 0.0
        self.others_in_close_wait: list[Entry] = []
        self.dated = dated
        self._wanted = wanted
        # By family and port.
        self._listeners: dict[tuple[int, bytes], list[Entry]] = {}

    def take(self, rows: Iterable[Row]) -> None:
        """Take in some connections; of one that has been seen before, this is the later state."""
        wanted, found = self._wanted, self.rows
        for row in rows:
            state, inode = row[1], row[10]
            if inode in wanted:
                found[inode] = row
            if state == LISTEN:
                self._listeners.setdefault((row[0], row[3]), []).append(Entry(*row))
            elif state == CLOSE_WAIT and inode not in wanted:
                self.others_in_close_wait.append(Entry(*row))
        self.at = self.at or procfs.seconds_since_boot()

    def is_complete(self) -> bool:
        """Whether each wanted socket has been seen."""
        return len(self.rows) == len(self._wanted)

    def is_accepted(self, entry: Entry) -> bool:
        """Whether a listener has a connection's address, so that it must have come from one."""
        # Of a client's connections, which may be many, none has a port of a listener.
        key = entry.family, entry.local_port
        return key in self._listeners and bool(self._listeners_of(entry))

    def listeners_for(self, entry: Entry) -> set[int]:
        """The inodes of those listeners that a connection may wait at to be accepted.

        The kernel says that of none. Several can have one address: by SO_REUSEPORT, or because
        one listens at all addresses and another at a single one.
        """
        found = self._listeners_of(entry)
        # Of a listener, what it has received is how many connections wait.
        waited_at = [each for each in found if each.received]
        return {each.inode for each in waited_at or found}

    def _listeners_of(self, entry: Entry) -> list[Entry]:
        """What came in by IPv4 at a listener of IPv6 is of that one's family, too."""
        if entry.state == LISTEN:
            return []
        of_port = self._listeners.get((entry.family, entry.local_port), ())
        return [
            each
            for each in of_port
            if each.local_host == entry.local_host or not any(each.local_host)
        ]


def network_of(
    namespace: int | None, pids: Sequence[int | str], wanted: Set[int], *, dated: bool
) -> Network | None:
    """The network of some processes; None where it cannot be looked at.

    Args:
        namespace: What identifies its network.
        pids: The processes in it; any of them may end meanwhile. "self" is this process.
        wanted: The inodes that matter.
        dated: Ask for the times of every connection, not only of those that have ended.
    """
    for pid in pids:
        for ask in (_by_netlink, _by_table):
            with suppress(OSError):
                network = ask(pid, wanted, dated=dated)
                # Another may have its number now, and live elsewhere.
                if namespace_of(pid) == namespace:
                    return network
    return None


def _by_netlink(pid: int | str, wanted: Set[int], *, dated: bool) -> Network:
    namespace = None if pid == "self" else f"/proc/{pid}/ns/net"
    with closing(netlink.open_socket(namespace)) as sock:
        network = Network(wanted, dated=True)
        network.take(netlink.dump(sock, _OPEN, dated=dated))
        network.take(netlink.dump(sock, 1 << CLOSE_WAIT, dated=True))
        # Most of these are the kernel's own, of sockets that were closed long ago.
        if not network.is_complete():
            network.take(netlink.dump(sock, _ENDING, dated=dated))
    return network


def _by_table(pid: int | str, wanted: Set[int], *, dated: bool) -> Network:  # noqa: ARG001
    network = Network(wanted, dated=False)
    network.take(procfs.table(pid))
    return network


def take_snapshot(pids: Sequence[int] | None, *, everything: bool) -> Snapshot:
    """Scan some processes, or all that there are."""
    processes, inaccessible = _read(procfs.all_pids() if pids is None else pids)
    # Only of a family that was asked for: the kernel is to date all connections for it.
    parents = {} if pids is None else _parents_of(processes)
    networks = _Networks(processes, dated=everything or bool(parents))
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

    def __init__(self, processes: Sequence[Process], *, dated: bool) -> None:
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
            found.copies = list(_unused_copies(process, parent, network))
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


def _unused_copies(process: Process, parent: Process, network: Network) -> Iterator[UnusedCopy]:
    """What came over fork() and the parent has closed, as far as no byte has passed since."""
    age, kept, calls = procfs.age_of(process, network.at), parent.owned, None
    for fd, inode in process.sockets.items():
        row = network.rows.get(inode)
        # A program that is started on a connection has it as 0, 1 or 2.
        if row is None or row[1] != ESTABLISHED or inode in kept or fd <= 2:
            continue
        entry = Entry(*row)
        found = _descriptor(fd, entry, network)
        if is_unused_since(found.view, age):
            calls = calls or _calls_of(process.pid)
            if fd not in calls.fds:
                # A child may take over what the parent has accepted and not answered.
                is_new = found.accepted and not entry.has_sent
                yield UnusedCopy(found, age, calls.may_use_others or is_new)


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
