"""Sockets that no socket object is known for: opened by native code, or received as a number."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from closewait_guard._birth import Birth
from closewait_guard._census import sockets_besides
from closewait_guard._descriptor import inode_of
from closewait_guard._drops import Drop
from closewait_guard._labels import current_labels
from closewait_guard._living import Living
from closewait_guard._stack import NO_STACK, Stack
from closewait_guard._story import NO_CONTEXT, STACK, Story
from closewait_guard.model import Origin

__all__ = ["Natives"]

# The share of the time that listing the descriptors may take, unless a scan is to be full.
_SHARE = 0.002
# Standard input, output and error are whoever's started us.
_FIRST = 3


class _Native(NamedTuple):
    """One of them: the inode tells it from the next that gets its number."""

    story: Story
    inode: int


class _Tracked(Protocol):
    """What is asked of the registry."""

    @property
    def pid(self) -> int: ...

    def knows(self, fd: int) -> bool: ...
    def mark(self) -> int: ...


class Natives:
    """Knows them from one census to the next, each with the birth that it was told of, if any.

    Answers an observer as the registry does.
    """

    def __init__(self, tracked: _Tracked) -> None:
        self._tracked = tracked
        self._known: dict[int, _Native] = {}
        self._stories: dict[int, Story] = {}
        self._counted_at = 0.0
        self._rests_until = 0.0
        # How many there are; None where nobody says.
        self.count: int | None = None

    @property
    def pid(self) -> int:
        """The process that the registry works in."""
        return self._tracked.pid

    def living(self, *, thorough: bool = False) -> Living:
        """Those that are open. The descriptors are listed anew when it is time to."""
        now = time.monotonic()
        if thorough or now >= self._rests_until:
            self._take_census()
            done = time.monotonic()
            self._rests_until = done + (done - now) / _SHARE
        for fd in [fd for fd in self._known if self._tracked.knows(fd)]:
            self._drop(fd)
        return Living(self._stories, set(), set(self._stories))

    def _take_census(self) -> None:
        found = sockets_besides(self._tracked.knows)
        self.count = None if found is None else len(found)
        if found is None:
            return
        is_first, self._counted_at = not self._counted_at, time.time()
        for fd, native in list(self._known.items()):
            if found.get(fd) != native.inode:
                self._drop(fd)
        for fd, inode in found.items():
            if fd not in self._known and fd >= _FIRST:
                born_at = None if is_first else self._counted_at
                self._take_in(fd, inode, self._story(born_at, NO_STACK))

    def forget(self, fd: int, story: Story) -> None:
        """Let go of one that is closed."""
        native = self._known.get(fd)
        if native is not None and native.story is story:
            self._drop(fd)

    def dropped(self) -> tuple[Drop, ...]:
        """None: nobody sees the end of what has no object."""
        return ()

    def claim(self, fds: Iterable[int], stack: Stack) -> None:
        """Say where some of them were born."""
        for fd in fds:
            inode, known = inode_of(fd), self._known.get(fd)
            if inode is None or self._tracked.knows(fd):
                continue
            if known is not None and known.inode == inode and known.story[STACK]:
                continue
            self._take_in(fd, inode, self._story(time.time(), stack))

    def present(self) -> set[int]:
        """The descriptors of all sockets that no object is known for, at this moment."""
        return set(sockets_besides(self._tracked.knows) or ())

    def after_fork(self) -> None:
        """In the child: a census of our own comes next."""
        self._rests_until = 0.0

    def _take_in(self, fd: int, inode: int, story: Story) -> None:
        self._known[fd] = _Native(story, inode)
        self._stories = {**self._stories, fd: story}

    def _drop(self, fd: int) -> None:
        self._known.pop(fd, None)
        self._stories = {known: story for known, story in self._stories.items() if known != fd}

    def _story(self, born_at: float | None, stack: Stack) -> Story:
        return tuple(
            Birth(
                sock=_no_object,  # type: ignore[arg-type]
                key=0,
                serial=self._tracked.mark(),
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
