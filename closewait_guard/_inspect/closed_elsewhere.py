"""Descriptors that were closed by something else than their socket objects, as by `os.close()`.

The number soon belongs to another file: what the kernel says of it does not apply to the object,
whose `close()` will close the other one. The inode that was noted when a scan saw the socket for
the first time distinguishes the two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from closewait_guard._capture import ORIGIN, SERIAL, SOCK, CreationTuple, pop_if_same, still_owns
from closewait_guard._descriptors import inode_of
from closewait_guard._inspect.probe import INVALID, Endpoint, endpoint_of
from closewait_guard.model import Origin

__all__ = [
    "ClosedElsewhere",
    "ForeignClose",
]


# How a socket comes to a number that the kernel has chosen, because it was free.
_BY_KERNEL = frozenset({Origin.CREATED, Origin.ACCEPTED, Origin.DUPLICATED})


class ForeignClose(NamedTuple):
    """A socket object that is open as far as it knows, and the number that is no longer its own."""

    creation: CreationTuple
    fd: int
    inode: int | None

    def endpoint(self) -> Endpoint | None:
        """What the object itself knows; None if it is gone."""
        sock = self.creation[SOCK]()
        if sock is None:
            return None
        return endpoint_of(sock, self.fd)._replace(local=None, peer=None, inode=self.inode)


_InodeNote = tuple[CreationTuple, int | None]


class _InodeTable(NamedTuple):
    """The inodes of the sockets that one scan took to be open."""

    creations: Mapping[int, CreationTuple]
    inodes: Mapping[int, _InodeNote]


class ClosedElsewhere:
    """Notes inodes, and finds the descriptors that have another by now. Holds no socket.

    Scans in several threads may differ in what is open, so each uses a table of its own: it is
    replaced as a whole, and what was found is kept entry by entry.
    """

    def __init__(self) -> None:
        self._table = _InodeTable({}, {})
        self._found: dict[int, ForeignClose] = {}

    def detect(
        self,
        creations: Mapping[int, CreationTuple],
        events: Mapping[int, int],
        to_describe: Collection[int],
    ) -> set[int]:
        """The numbers that are not those of their sockets any more.

        Args:
            creations: All that are taken to be open; the same object while there is nothing new.
            events: What has happened to them.
            to_describe: Those that are going to be described.
        """
        table = self._table
        if creations is not table.creations:
            table = self._table = _InodeTable(creations, self._note_inodes(creations, table.inodes))
        closed = {fd for fd in to_describe if _is_closed_elsewhere(fd, table.inodes, events)}
        for fd in closed:
            self._add(creations[fd], fd, table.inodes[fd][1])
        return closed

    def _note_inodes(
        self, creations: Mapping[int, CreationTuple], before: Mapping[int, _InodeNote]
    ) -> Mapping[int, _InodeNote]:
        inodes: dict[int, _InodeNote] = {}
        for fd, creation in creations.items():
            known = before.get(fd)
            if known is not None and known[0] is creation:
                inodes[fd] = known
                continue
            if known is not None and _has_taken(creation, known[0]) and still_owns(known[0], fd):
                self._add(known[0], fd, known[1])
            inodes[fd] = (creation, inode_of(fd))
        return inodes

    def _add(self, creation: CreationTuple, fd: int, inode: int | None) -> None:
        self._found.setdefault(creation[SERIAL], ForeignClose(creation, fd, inode))

    def current(self) -> Iterator[ForeignClose]:
        """Those whose objects are still there, and have not been closed."""
        for serial, foreign_close in self._found.copy().items():
            if still_owns(foreign_close.creation, foreign_close.fd):
                yield foreign_close
            else:
                pop_if_same(self._found, serial, foreign_close)


def _is_closed_elsewhere(
    fd: int, inodes: Mapping[int, _InodeNote], events: Mapping[int, int]
) -> bool:
    if fd not in inodes:
        return False
    creation, inode = inodes[fd]
    is_free = bool(events.get(fd, 0) & INVALID)
    # An object that is closing lets go of the number before the kernel does.
    return (is_free or inode_of(fd) != inode) and still_owns(creation, fd)


def _has_taken(newer: CreationTuple, older: CreationTuple) -> bool:
    """Whether the kernel has given one socket the number of another that was opened before."""
    return newer[ORIGIN] in _BY_KERNEL and bool(newer[SERIAL] > older[SERIAL])
