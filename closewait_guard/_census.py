"""The process's own descriptors: how many there may be, how many are open, which are sockets."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from closewait_guard._clock import now
from closewait_guard._descriptor import Identity
from closewait_guard._refusals import refusals

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["fd_limit", "fd_used", "own_socket", "sockets_besides"]

# The one that the guard itself keeps open, if it does: a line to `run`.
own_socket: Identity | None = None

_FD_FOLDER = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"


def fd_limit() -> int | None:
    """The soft limit on open descriptors; None where there is none, or nobody says."""
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


class _Used:
    """Counts the open descriptors. A count that took long is good for a while."""

    def __init__(self) -> None:
        self._listed, self._good_until = 0, 0.0

    def __call__(self) -> int | None:
        """How many descriptors are open; None where nobody says."""
        try:
            # Since Linux 6.2 the folder's size is the count: no descriptor is needed to learn it,
            # which matters when there is none left.
            size = Path(_FD_FOLDER).stat().st_size
            return size if sys.platform == "linux" and size else self._by_listing()
        except Exception as error:
            refusals.note(error)
            return fd_limit() if getattr(error, "errno", None) in _EXHAUSTED else None

    def _by_listing(self) -> int:
        """Takes a microsecond for each, more than all the rest of a scan."""
        begun = now()
        if begun >= self._good_until:
            self._listed = len(_names()) - 1
            took = now() - begun
            self._good_until = begun + (took / _LARGEST_SHARE if took > _LONG else 0.0)
        return self._listed


fd_used = _Used()

_EXHAUSTED = frozenset({errno.ENFILE, errno.EMFILE})
_LONG, _LARGEST_SHARE = 0.001, 0.05


def _names() -> list[str]:
    # A path object for each name would take ten times as long.
    return os.listdir(_FD_FOLDER)  # noqa: PTH208


def sockets_besides(is_known: Callable[[int], bool]) -> dict[int, int] | None:
    """The program's open sockets that are not known, with their inodes; None where nobody says.

    One listing of a folder, whatever their number; only what is not known is looked at.
    """
    try:
        names = _names()
    except Exception as error:
        refusals.note(error)
        return None
    found: dict[int, int] = {}
    for name in names:
        fd = int(name)
        if not is_known(fd):
            try:
                status = os.fstat(fd)
            except OSError:
                continue
            kind = stat.S_IFMT(status.st_mode)
            if kind == stat.S_IFSOCK and (status.st_dev, status.st_ino, kind) != own_socket:
                found[fd] = status.st_ino
    return found
