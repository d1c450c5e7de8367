"""Which other processes hold the same sockets: those that we have forked from, or that forked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from contextlib import suppress
from itertools import islice
from pathlib import Path

__all__ = [
    "processes_sharing",
]


_MOST_PROCESSES = 64
# The parent of every orphan.
_INIT = 1
_MOST_DESCRIPTORS = 20_000


def processes_sharing(inodes: Set[int], *, of_parent: bool) -> dict[int, list[str]]:
    """By inode: the processes that hold a socket too, as sentences. Linux only.

    Args:
        inodes: Those of the sockets.
        of_parent: Some of them came over a fork: look at the parent and its other children too.
    """
    found: dict[int, list[str]] = {}
    processes = [os.getppid(), *_children(os.getppid())] if of_parent else []
    processes += _children(os.getpid())
    for pid in islice(dict.fromkeys(processes), _MOST_PROCESSES):
        if pid != os.getpid():
            for inode in inodes & _sockets_of(pid):
                found.setdefault(inode, []).append(
                    f"process {pid} ({_command(pid)}) too, as a copy"
                )
    return found


def _children(pid: int) -> Iterator[int]:
    """The processes that a process has started and that still run, and theirs."""
    begun = [pid]
    for parent in begun:
        if len(begun) > _MOST_PROCESSES or pid == _INIT:
            break
        with suppress(OSError, ValueError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                begun += [int(child) for child in (task / "children").read_text().split()]
    return iter(begun[1:])


def _sockets_of(pid: int) -> set[int]:
    found: set[int] = set()
    with suppress(OSError):
        for entry in islice(Path(f"/proc/{pid}/fd").iterdir(), _MOST_DESCRIPTORS):
            with suppress(OSError):
                what = str(entry.readlink())
                if what.startswith("socket:["):
                    found.add(int(what[8:-1]))
    return found


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "gone"
