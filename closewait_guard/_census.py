"""The process's own descriptors: how many there may be, how many are open, which are sockets."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["fd_limit", "fd_used", "sockets_besides"]

_FD_FOLDER = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"


def fd_limit() -> int | None:
    """The soft limit on open descriptors; None where there is none, or nobody says."""
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def fd_used() -> int | None:
    """How many descriptors are open; None where nobody says."""
    try:
        # Since Linux 6.2 the folder's size is the count: no descriptor is needed to learn it,
        # which matters when there is none left.
        size = Path(_FD_FOLDER).stat().st_size
        if sys.platform == "linux" and size:
            return size
        return sum(1 for _ in Path(_FD_FOLDER).iterdir()) - 1
    except OSError as error:
        return fd_limit() if error.errno in _EXHAUSTED else None


_EXHAUSTED = frozenset({errno.ENFILE, errno.EMFILE})


def sockets_besides(is_known: Callable[[int], bool]) -> dict[int, int] | None:
    """The open sockets that are not known, with their inodes; None where nobody says.

    One listing of a folder, whatever their number; only what is not known is looked at.
    """
    try:
        # A path object for each name would take ten times as long.
        names = os.listdir(_FD_FOLDER)  # noqa: PTH208
    except OSError:
        return None
    found: dict[int, int] = {}
    for name in names:
        fd = int(name)
        if not is_known(fd):
            try:
                status = os.fstat(fd)
            except OSError:
                continue
            if stat.S_ISSOCK(status.st_mode):
                found[fd] = status.st_ino
    return found
