"""Tell who starts a thread: context variables do not follow into one."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

__all__ = ["unwatch", "watch"]

Watcher = Callable[[threading.Thread], None]

_watchers: list[Watcher] = []
_found = threading.Thread.start
_in_place = False


@functools.wraps(_found)
def _start(self: threading.Thread) -> None:
    for watcher in tuple(_watchers):
        watcher(self)
    _found(self)


def watch(watcher: Watcher) -> None:
    """Tell `watcher` of every thread, in the thread that starts it, just before."""
    global _found, _in_place
    _watchers.append(watcher)
    # One that somebody has covered with a patch of his own is still there, beneath.
    if not _in_place:
        _found = threading.Thread.start
        threading.Thread.start = _start  # type: ignore[method-assign]
        _in_place = True


def unwatch(watcher: Watcher) -> None:
    """Stop telling. The last one to go takes the patch out, unless it is covered."""
    global _in_place
    _watchers.remove(watcher)
    if not _watchers and threading.Thread.start is _start:
        threading.Thread.start = _found  # type: ignore[method-assign]
        _in_place = False
