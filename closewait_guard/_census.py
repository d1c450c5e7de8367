"""The process's own descriptors: how many are open, how many there may be."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

__all__ = ["fd_limit", "fd_used"]

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
