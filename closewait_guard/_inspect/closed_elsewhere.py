"""Descriptors that were closed behind the back of their socket objects, as by `os.close()`.

The number soon belongs to somebody else, whom the object knows nothing of: what the kernel says of
that number is no word on the object, and its `close()` will hit the stranger. An inode that was
noted when a scan saw the socket for the first time tells the two apart.
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


_Noted = tuple[CreationTuple, int | None]


class _Notes(NamedTuple):
    """The inodes of those that one scan took to be open."""

    creations: Mapping[int, CreationTuple]
    inodes: Mapping[int, _Noted]


class ClosedElsewhere:
    """Notes inodes, and what they betray. Holds no socket.

    Scans in several threads may differ in what is open, so each goes by its own notes: they are
    replaced as a whole, and what was found is kept entry by entry.
    """

    def __init__(self) -> None:
        self._notes = _Notes({}, {})
        self._found: dict[int, ForeignClose] = {}

    def notice(
        self,
        creations: Mapping[int, CreationTuple],
        events: Mapping[int, int],
        looked_at: Collection[int],
    ) -> set[int]:
        """The numbers that are not those of their sockets any more.

        Args:
            creations: All that are taken to be open; the same object while there is nothing new.
            events: What has happened to them.
            looked_at: Those of which something is going to be told.
        """
        notes = self._notes
        if creations is not notes.creations:
            notes = self._notes = _Notes(creations, self._noted(creations, notes.inodes))
        stolen = {fd for fd in looked_at if _is_stolen(fd, notes.inodes, events)}
        for fd in stolen:
            self._add(creations[fd], fd, notes.inodes[fd][1])
        return stolen

    def _noted(
        self, creations: Mapping[int, CreationTuple], before: Mapping[int, _Noted]
    ) -> Mapping[int, _Noted]:
        noted: dict[int, _Noted] = {}
        for fd, creation in creations.items():
            known = before.get(fd)
            if known is not None and known[0] is creation:
                noted[fd] = known
                continue
            if known is not None and _has_taken(creation, known[0]) and still_owns(known[0], fd):
                self._add(known[0], fd, known[1])
            noted[fd] = (creation, inode_of(fd))
        return noted

    def _add(self, creation: CreationTuple, fd: int, inode: int | None) -> None:
        self._found.setdefault(creation[SERIAL], ForeignClose(creation, fd, inode))

    def standing(self) -> Iterator[ForeignClose]:
        """Those whose objects are still there, and have not been closed."""
        for serial, theft in self._found.copy().items():
            if still_owns(theft.creation, theft.fd):
                yield theft
            else:
                pop_if_same(self._found, serial, theft)


def _is_stolen(fd: int, noted: Mapping[int, _Noted], events: Mapping[int, int]) -> bool:
    if fd not in noted:
        return False
    creation, inode = noted[fd]
    is_free = bool(events.get(fd, 0) & INVALID)
    # An object that is closing lets go of the number before the kernel does.
    return (is_free or inode_of(fd) != inode) and still_owns(creation, fd)


def _has_taken(younger: CreationTuple, older: CreationTuple) -> bool:
    """Whether the kernel has given one socket the number of another that was opened before."""
    return younger[ORIGIN] in _BY_KERNEL and bool(younger[SERIAL] > older[SERIAL])
