"""Births that are over, as far as their sockets go, and whose numbers are open all the same.

Such a socket may be in the middle of its end: an object that closes lets go of its number before
the kernel does, and the collector clears weak references before it calls finalizers. Or it has
ended, and native code has been given the number since. The one passes, the other stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from closewait_guard._clock import now
from closewait_guard._descriptor import socket_inode_of
from closewait_guard._story import Story, discard

__all__ = ["Endings"]

# A collection in which finalizers wait for something may take long.
_LONGEST = 60.0


class _Ending(NamedTuple):
    """When the end of a birth was noticed, and which socket had its number then."""

    story: Story
    inode: int
    since: float


class Endings:
    """Tells births that are over from those that are about to be."""

    def __init__(self) -> None:
        self._noticed: dict[int, _Ending] = {}

    def is_over(self, fd: int, story: Story) -> bool:
        """Whether a birth whose socket is closed or gone needs to be known no longer."""
        inode, noticed = socket_inode_of(fd), self._noticed.get(fd)
        if inode is None:
            return True
        if noticed is None or noticed.story is not story:
            self._noticed[fd] = _Ending(story, inode, now())
            return False
        return inode != noticed.inode or now() - noticed.since > _LONGEST

    def forget_all_but(self, births: Mapping[int, Story]) -> None:
        """Let go of those that are known no longer, or whose numbers have been given away."""
        for fd, ending in self._noticed.copy().items():
            if births.get(fd) is not ending.story:
                discard(self._noticed, fd, ending)
