"""Linux: the TCP connections of one network namespace, as far as they concern some processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from itertools import chain

from closewait_guard._outside import _netlink, _procnet
from closewait_guard._outside._entry import CLOSE_WAIT, LISTEN, Entry, Row

__all__ = ["Network", "of_process"]

# All in which a program can have a socket: not TIME_WAIT, SYN_RECV and NEW_SYN_RECV, which are the
# kernel's own. The closed and unconnected are in no table.
_OWNED = sum(1 << number for number in (1, 2, 4, 5, 9, LISTEN, 11))


class Network:
    """Connections by inode.

    Attributes:
        rows: Of the wanted sockets.
        strays: In CLOSE_WAIT, and not of the wanted.
        dated: The kernel said when the peers have closed.
    """

    def __init__(self, rows: Iterable[Row], wanted: Set[int], *, dated: bool) -> None:
        self.rows: dict[int, Row] = {}
        self.strays: list[Entry] = []
        self.dated = dated
        self._listeners: dict[bytes, int] = {}
        for row in rows:
            _, state, local_port, *_, inode = row[:10]
            if inode in wanted:
                self.rows[inode] = row
            if state == LISTEN:
                self._listeners[local_port] = inode
            elif state == CLOSE_WAIT and inode not in wanted:
                self.strays.append(Entry(*row))

    def listener_of(self, entry: Entry) -> int | None:
        """The inode of the listener whose address a connection has."""
        if entry.state == LISTEN:
            return None
        return self._listeners.get(entry.local_port)


def of_process(pid: int | None, wanted: Set[int], *, own: bool, dated: bool) -> Network:
    """The network that a process lives in.

    Args:
        pid: The process; None for this one.
        wanted: The inodes that matter.
        own: It is this process's network, too.
        dated: Ask for the times of every connection, not only of those that have ended.
    """
    try:
        with _netlink.opened(None if own else f"/proc/{pid}/ns/net") as sock:
            rows = chain(
                _netlink.dump(sock, _OWNED, dated=dated),
                _netlink.dump(sock, 1 << CLOSE_WAIT, dated=True),
            )
            return Network(rows, wanted, dated=True)
    except OSError:
        return Network(_readable(pid or "self"), wanted, dated=False)


def _readable(pid: int | str) -> Iterator[Entry]:
    try:
        yield from _procnet.table(pid)
    except OSError:
        # It has ended meanwhile.
        return
