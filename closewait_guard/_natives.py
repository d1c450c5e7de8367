"""Sockets that no socket object is known for: opened by native code, or received as a number."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from operator import is_
from typing import NamedTuple, Protocol

from closewait_guard._birth import Birth
from closewait_guard._census import sockets_besides
from closewait_guard._clock import now, wall
from closewait_guard._descriptor import inode_of
from closewait_guard._drops import Drop
from closewait_guard._labels import current_labels
from closewait_guard._living import Living
from closewait_guard._stack import NO_STACK, Stack
from closewait_guard._story import NO_CONTEXT, SERIAL, STACK, Story, discard
from closewait_guard.model import Observation, Origin

__all__ = ["SETTLED_AFTER", "Natives"]

# The share of the time that listing the descriptors may take, unless a scan is to be full.
_SHARE = 0.002
# Seconds in which any thread has had its turn that was between two system calls.
SETTLED_AFTER = 1.0
# Standard input, output and error are whoever's started us.
_FIRST = 3


class _Native(NamedTuple):
    """One of them: the inode tells it from the next that gets its number.

    Attributes:
        since: Socket objects that are younger than this mark have had the number after it.
        seen_at: When it was taken in.
    """

    story: Story
    inode: int
    since: int
    seen_at: float


class _Tracked(Protocol):
    """What is asked of the registry."""

    @property
    def pid(self) -> int: ...

    def knows(self, fd: int, since: float = ...) -> bool: ...
    def mark(self) -> int: ...


class Natives:
    """Knows them from one census to the next, each with the birth that it was told of, if any.

    Answers an observer as the registry does. Scans and calls in several threads write to it at
    once, so each of them is written and removed by itself.
    """

    def __init__(self, tracked: _Tracked) -> None:
        self._tracked = tracked
        self._known: dict[int, _Native] = {}
        # As they were handed out last.
        self._stories: dict[int, Story] = {}
        self._youngest = 0
        self._has_counted = False
        self._rests_until = 0.0
        # How many there are; None where nobody says.
        self.count: int | None = None

    @property
    def pid(self) -> int:
        """The process that the registry works in."""
        return self._tracked.pid

    def living(self, *, thorough: bool = False) -> Living:
        """Those that are open. The descriptors are listed anew when it is time to."""
        began = now()
        if thorough or began >= self._rests_until:
            self._take_census()
            done = now()
            self._rests_until = done + (done - began) / _SHARE
        if not self._known:
            return Living({}, set(), set())
        known = self._known.copy()
        for fd in [fd for fd, native in known.items() if self._tracked.knows(fd, native.since)]:
            discard(self._known, fd, known.pop(fd))
        stories = self._handed_out({fd: native.story for fd, native in known.items()})
        return Living(stories, set(), set(stories))

    def _handed_out(self, stories: dict[int, Story]) -> dict[int, Story]:
        """The same object for as long as there is nothing new, which saves a poller much."""
        last = self._stories
        if stories.keys() == last.keys() and all(map(is_, stories.values(), last.values())):
            return last
        self._stories = stories
        return stories

    def youngest(self) -> int:
        """The serial of the latest that was taken in."""
        return self._youngest

    def _take_census(self) -> None:
        # Both before the listing: what is told or born meanwhile is younger than what is found.
        before, since = self._known.copy(), self._tracked.mark()
        found = sockets_besides(self._tracked.knows)
        self.count = None if found is None else len(found)
        if found is None:
            return
        born_at = wall() if self._has_counted else None
        self._has_counted = True
        for fd, native in before.items():
            if found.get(fd) != native.inode:
                discard(self._known, fd, native)
        for fd, inode in found.items():
            if fd not in self._known and fd >= _FIRST:
                story = self._story(born_at, NO_STACK)
                self._known.setdefault(fd, _Native(story, inode, since, now()))

    def is_new(self, seen: Observation) -> bool:
        """Whether it has not been one for long enough that it cannot be anything else.

        A socket that another thread is in the middle of making, or of closing, has no object
        either: but not for long.
        """
        native = self._known.get(seen.fd)
        return native is not None and now() < native.seen_at + SETTLED_AFTER and self.is_still(seen)

    def is_still(self, seen: Observation) -> bool:
        """Whether what was seen is open yet, and nobody's."""
        native = self._known.get(seen.fd)
        return (
            native is not None
            and native.story[SERIAL] == seen.record.serial
            and native.inode == seen.inode == inode_of(seen.fd)
            and not self._tracked.knows(seen.fd, native.since)
        )

    def forget(self, fd: int, story: Story) -> None:
        """Let go of one that is closed."""
        native = self._known.get(fd)
        if native is not None and native.story is story:
            discard(self._known, fd, native)

    def dropped(self) -> tuple[Drop, ...]:
        """None: nobody sees the end of what has no object."""
        return ()

    def claim(self, fds: Iterable[int], stack: Stack) -> None:
        """Say where some of them were born."""
        for fd in fds:
            since, inode, known = self._tracked.mark(), inode_of(fd), self._known.get(fd)
            if inode is None or self._tracked.knows(fd):
                continue
            if known is not None and known.inode == inode and known.story[STACK]:
                continue
            self._known[fd] = _Native(self._story(wall(), stack), inode, since, now())

    def present(self) -> set[int]:
        """The descriptors of all sockets that no object is known for, at this moment."""
        return set(sockets_besides(self._tracked.knows) or ())

    def after_fork(self) -> None:
        """In the child: a census of our own comes next."""
        self._rests_until = 0.0

    def _story(self, born_at: float | None, stack: Stack) -> Story:
        serial = self._youngest = self._tracked.mark()
        return tuple(
            Birth(
                sock=_no_object,  # type: ignore[arg-type]
                key=0,
                serial=serial,
                pid=os.getpid(),
                born_at=born_at,
                thread=threading.current_thread().name if stack else "",
                task=None,
                labels=current_labels() if stack else (),
                context=NO_CONTEXT,
                origin=Origin.NATIVE,
                parent=None,
                stack=stack,
            )
        )


def _no_object() -> None:
    """What a weak reference answers when its object is gone."""
