"""Descriptors that were closed behind the back of their socket objects, as by `os.close()`.

The number soon belongs to somebody else, whom the object knows nothing of: what the kernel says of
that number is no word on the object, and its `close()` will hit the stranger. An inode that was
noted when a scan saw the socket for the first time tells the two apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from closewait_guard._descriptor import inode_of
from closewait_guard._probe import INVALID, Endpoint, endpoint_of
from closewait_guard._story import ORIGIN, SERIAL, SOCK, Story, holds
from closewait_guard.model import Origin

__all__ = ["Theft", "Thefts"]

# How a socket comes to a number that the kernel has chosen, because it was free.
_BY_KERNEL = frozenset({Origin.CREATED, Origin.ACCEPTED, Origin.DUPLICATED})


class Theft(NamedTuple):
    """A socket object that is open as far as it knows, and the number that is no longer its own."""

    story: Story
    fd: int
    inode: int | None

    def endpoint(self) -> Endpoint | None:
        """What the object itself knows; None if it is gone."""
        sock = self.story[SOCK]()
        if sock is None:
            return None
        return endpoint_of(sock, self.fd)._replace(local=None, peer=None, inode=self.inode)


class Thefts:
    """Notes inodes, and what they betray. Holds no socket."""

    def __init__(self) -> None:
        self._noted: dict[int, tuple[Story, int | None]] = {}
        self._of: Mapping[int, Story] = {}
        self._found: dict[int, Theft] = {}

    def notice(
        self, stories: Mapping[int, Story], events: Mapping[int, int], looked_at: Collection[int]
    ) -> set[int]:
        """The numbers that are not those of their sockets any more.

        Args:
            stories: All that are taken to be open; the same object while there is nothing new.
            events: What has happened to them.
            looked_at: Those of which something is going to be told.
        """
        if stories is not self._of:
            self._note(stories)
            self._of = stories
        stolen = {fd for fd in looked_at if self._is_stolen(fd, stories, events)}
        for fd in stolen:
            self._add(Theft(stories[fd], fd, self._noted[fd][1]))
        return stolen

    def _is_stolen(self, fd: int, stories: Mapping[int, Story], events: Mapping[int, int]) -> bool:
        noted = self._noted.get(fd)
        if noted is None or stories.get(fd) is not noted[0]:
            return False
        is_free = bool(events.get(fd, 0) & INVALID)
        # An object that is closing lets go of the number before the kernel does.
        return (is_free or inode_of(fd) != noted[1]) and holds(noted[0], fd)

    def _note(self, stories: Mapping[int, Story]) -> None:
        before, self._noted = self._noted, {}
        for fd, story in stories.items():
            known = before.get(fd)
            if known is not None and known[0] is story:
                self._noted[fd] = known
                continue
            if known is not None and story[ORIGIN] in _BY_KERNEL and holds(known[0], fd):
                self._add(Theft(known[0], fd, known[1]))
            self._noted[fd] = (story, inode_of(fd))

    def _add(self, theft: Theft) -> None:
        self._found.setdefault(theft.story[SERIAL], theft)

    def standing(self) -> list[Theft]:
        """Those whose objects are still there, and have not been closed."""
        self._found = {
            serial: theft for serial, theft in self._found.items() if holds(theft.story, theft.fd)
        }
        return list(self._found.values())
