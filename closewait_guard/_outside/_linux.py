"""Linux: which process has which connection, from /proc and the kernel's tables."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from closewait_guard._outside import _network, _processes
from closewait_guard._outside._entry import CLOSE_WAIT, Entry, view_of
from closewait_guard._outside._network import Network
from closewait_guard._outside._process import Process
from closewait_guard._outside._sight import Copy, Descriptor, Everything, Refusal, Sight, Stray
from closewait_guard._outside._untabled import Untabled
from closewait_guard._probe import Endpoint
from closewait_guard._probe._linux import STATES
from closewait_guard.model import State

__all__ = ["descendants", "look"]


def look(pids: Sequence[int] | None, *, everything: bool) -> Everything:
    """Look at some processes, or at all that there are."""
    processes, refused = _read(_processes.all_pids() if pids is None else pids)
    networks = _Networks(processes, everything=everything)
    at = time.monotonic()
    looks = []
    for process in processes:
        look = networks.look_at(process, everything=everything)
        if not _processes.has_stayed(process):
            refused.append(Refusal(process.pid, "", None, exists=False))
        elif look is None:
            refused.append(_refusal(process.pid, _NO_NETWORK))
        else:
            looks.append(look)
    copies = _copies([look.process for look in looks], looks, complete=pids is None)
    if pids is None:
        # Processes end all the time: only who was asked for is missed.
        refused = [each for each in refused if each.exists and each.is_a_loss]
    return Everything(
        at,
        [look.sight(copies) for look in looks],
        refused,
        list(_strays(networks, refused, complete=pids is None)),
        hides=pids is None and _processes.are_hidden(),
    )


def descendants(pids: Sequence[int]) -> list[int]:
    """The processes, with all those that they have started, and so on."""
    children: dict[int, list[int]] = {}
    for pid, parent in _processes.parents():
        children.setdefault(parent, []).append(pid)
    found = dict.fromkeys(pids)
    waiting = list(found)
    while waiting:
        young = [pid for pid in children.get(waiting.pop(), ()) if pid not in found]
        found |= dict.fromkeys(young)
        waiting += young
    return list(found)


_NO_NETWORK = "lives in a network that cannot be looked at"


def _read(pids: Iterable[int]) -> tuple[list[Process], list[Refusal]]:
    found, refused = [], []
    for pid in dict.fromkeys(pids):
        try:
            found.append(_processes.read(pid))
        except ProcessLookupError:
            refused.append(Refusal(pid, "", None, exists=_processes.is_hidden(pid)))
        except PermissionError:
            refused.append(_refusal(pid))
        except _processes.HasNoDescriptorsError as error:
            refused.append(_refusal(pid, str(error))._replace(is_a_loss=False))
        except OSError as error:
            refused.append(_refusal(pid, f"cannot be looked into: {error.strerror}"))
    return found, refused


def _refusal(pid: int, why: str = "") -> Refusal:
    """With what may be known of the process all the same."""
    program, uid = "", None
    with suppress(OSError):
        uid = _processes.user_of(pid)
        program = _processes.program(pid)
    exists = uid is not None or _processes.is_hidden(pid)
    return Refusal(pid, program, uid, exists=exists, why=why)


class _Networks:
    """The networks that processes live in, each asked once."""

    def __init__(self, processes: Sequence[Process], *, everything: bool) -> None:
        own = _processes.namespace_of("self")
        self._homes = {each.pid: _processes.namespace_of(each.pid) for each in processes}
        residents: dict[int | None, list[Process]] = {own: []}
        for process in processes:
            residents.setdefault(self._homes[process.pid], []).append(process)
        self._networks = {
            home: _network.of_namespace(
                home,
                ["self"] if home == own else [process.pid for process in living],
                {inode for process in living for inode in process.sockets.values()},
                dated=everything,
            )
            for home, living in residents.items()
        }
        self.own = self._networks[own]

    def look_at(self, process: Process, *, everything: bool) -> _Look | None:
        """One process's sockets; None where its network cannot be looked at."""
        network = self._networks[self._homes[process.pid]]
        return None if network is None else _Look(process, network, everything)


class _Look:
    """One process's sockets, sorted."""

    def __init__(self, process: Process, network: Network, everything: bool) -> None:
        self.states: Counter[str] = Counter()
        self.ended: list[Descriptor] = []
        self._others: list[Descriptor] = []
        self.process = process
        self._network = network
        untabled = Untabled(process)
        for fd, inode in process.sockets.items():
            row = network.rows.get(inode)
            if row is None:
                self._take_untabled(untabled, fd, inode, everything)
                continue
            state = row[1]
            self.states[STATES[state] if state < len(STATES) else State.NONE] += 1
            if state == CLOSE_WAIT:
                self.ended.append(_descriptor(fd, Entry(*row), network))
            elif everything:
                self._others.append(_descriptor(fd, Entry(*row), network))

    def _take_untabled(self, untabled: Untabled, fd: int, inode: int, everything: bool) -> None:
        protocol = untabled.protocol(fd, inode)
        if protocol is None:
            return
        found = untabled.unconnected(fd, inode, protocol)
        self.states[found.view.state if found else protocol.partition("-")[0]] += 1
        if found:
            self.ended.append(found)
        elif everything:
            self._others.append(untabled.described(fd, inode, protocol))

    def sight(self, copies: Mapping[int, Sequence[Copy]]) -> Sight:
        return Sight(
            self.process,
            self.states,
            self.ended,
            self._others,
            copies,
            *self._backlog(),
            self._network.dated,
        )

    def _backlog(self) -> tuple[Counter[str], Counter[str]]:
        """What waits at listeners of this process, and what may wait at one of another instead."""
        own = set(self.process.sockets.values())
        certain, uncertain = Counter[str](), Counter[str]()
        for entry in self._network.strays:
            if entry.inode == 0:
                listeners = self._network.waits_at(entry)
                if not own.isdisjoint(listeners):
                    (certain if own >= listeners else uncertain)[entry.local] += 1
        return certain, uncertain


def _descriptor(fd: int, entry: Entry, network: Network) -> Descriptor:
    """A table's entry as one process has it."""
    endpoint = Endpoint(entry.family_name, "SOCK_STREAM", entry.local, entry.peer, entry.inode)
    return Descriptor(fd, endpoint, view_of(entry), network.has_come_in(entry))


def _copies(
    processes: Sequence[Process], looks: Iterable[_Look], *, complete: bool
) -> dict[int, list[Copy]]:
    """Who has the ended sockets open, in whatever process that may be looked into."""
    ended = [each for look in looks for each in look.ended]
    if not ended:
        return {}
    inodes = {each.endpoint.inode for each in ended}
    known = {process.pid: process.sockets for process in processes}
    # A fork's copy keeps the number; a program that is started on a socket has it as 0, 1 or 2.
    likely = frozenset({0, 1, 2, *(each.fd for each in ended)})
    others = [] if complete else set(_processes.all_pids()) - known.keys()
    found: dict[int, list[Copy]] = {}
    for pid, sockets in (*known.items(), *_processes.some_sockets_of(others, likely)):
        mine = {fd: inode for fd, inode in sockets.items() if inode in inodes}
        with suppress(OSError):
            program = _processes.program(pid) if mine else ""
            for fd, inode in mine.items():
                found.setdefault(inode, []).append(Copy(pid, program, fd))
    return {inode: copies for inode, copies in found.items() if len(copies) > 1}


def _strays(networks: _Networks, refused: Sequence[Refusal], *, complete: bool) -> Iterator[Stray]:
    """Sockets in CLOSE_WAIT of those who may not be looked into, or are not to be seen."""
    users = {each.uid for each in refused if each.exists and each.is_a_loss}
    network = networks.own
    if network is None:
        return
    for entry in network.strays:
        if entry.inode and (complete or entry.uid in users):
            yield Stray(entry.uid, _descriptor(-1, entry, network))
