"""Linux: the TCP connections of one network namespace, as far as they concern some processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from contextlib import suppress

from closewait_guard._outside import _netlink, _procnet
from closewait_guard._outside._entry import CLOSE_WAIT, LISTEN, Entry, Row
from closewait_guard._outside._processes import namespace_of

__all__ = ["Network", "of_namespace"]

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
        strays: In CLOSE_WAIT, and not of the wanted.
    """

    def __init__(self, wanted: Set[int], *, dated: bool) -> None:
        self.rows: dict[int, Row] = {}
        self.strays: list[Entry] = []
        self.dated = dated
        self._wanted = wanted
        # By family and port.
        self._listeners: dict[tuple[int, bytes], list[Entry]] = {}

    def take(self, rows: Iterable[Row]) -> None:
        """Take in some connections; of one that has been seen before, this is the later state."""
        wanted, found = self._wanted, self.rows
        for row in rows:
            state, inode = row[1], row[9]
            if inode in wanted:
                found[inode] = row
            if state == LISTEN:
                self._listeners.setdefault((row[0], row[2]), []).append(Entry(*row))
            elif state == CLOSE_WAIT and inode not in wanted:
                self.strays.append(Entry(*row))

    def is_complete(self) -> bool:
        """Whether each wanted socket has been seen."""
        return len(self.rows) == len(self._wanted)

    def has_come_in(self, entry: Entry) -> bool:
        """Whether a listener has a connection's address, so that it must have come from one."""
        return bool(self._listeners_of(entry))

    def waits_at(self, entry: Entry) -> set[int]:
        """The inodes of those listeners that a connection may wait at to be accepted.

        The kernel tells that of none. Several can have one address: by SO_REUSEPORT, or because
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


def of_namespace(
    home: int | None, pids: Sequence[int | str], wanted: Set[int], *, dated: bool
) -> Network | None:
    """The network of some processes; None where it cannot be looked at.

    Args:
        home: What tells it from other networks.
        pids: Who lives there; any of them may end meanwhile. "self" is this process.
        wanted: The inodes that matter.
        dated: Ask for the times of every connection, not only of those that have ended.
    """
    for pid in pids:
        for ask in (_by_netlink, _by_table):
            with suppress(OSError):
                network = ask(pid, wanted, dated=dated)
                # Another may have its number now, and live elsewhere.
                if namespace_of(pid) == home:
                    return network
    return None


def _by_netlink(pid: int | str, wanted: Set[int], *, dated: bool) -> Network:
    with _netlink.opened(None if pid == "self" else f"/proc/{pid}/ns/net") as sock:
        network = Network(wanted, dated=True)
        network.take(_netlink.dump(sock, _OPEN, dated=dated))
        network.take(_netlink.dump(sock, 1 << CLOSE_WAIT, dated=True))
        # Most of these are the kernel's own, of sockets that were closed long ago.
        if not network.is_complete():
            network.take(_netlink.dump(sock, _ENDING, dated=dated))
    return network


def _by_table(pid: int | str, wanted: Set[int], *, dated: bool) -> Network:  # noqa: ARG001
    network = Network(wanted, dated=False)
    network.take(_procnet.table(pid))
    return network
