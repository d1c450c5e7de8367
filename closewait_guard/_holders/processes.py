"""Which other processes share a socket: the parent, its other children, and our own children."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from contextlib import suppress
from itertools import islice
from pathlib import Path

from closewait_guard._descriptors import sockets_of_process

__all__ = [
    "processes_sharing",
]


_MAX_PROCESSES = 64
# The process that adopts every orphan.
_INIT = 1
_MAX_DESCRIPTORS = 20_000


def processes_sharing(inodes: Set[int], *, of_parent: bool) -> dict[int, list[str]]:
    """By inode, the other processes that have the socket open, as sentences. Linux only.

    Args:
        inodes: The inodes of the sockets.
        of_parent: Include the parent and its other children: some sockets came through a fork.
    """
    found: dict[int, list[str]] = {}
    processes = [os.getppid(), *_children(os.getppid())] if of_parent else []
    processes += _children(os.getpid())
    for pid in islice(dict.fromkeys(processes), _MAX_PROCESSES):
        if pid != os.getpid():
            for inode in inodes & _sockets_of(pid):
                found.setdefault(inode, []).append(
                    f"process {pid} ({_command(pid)}) too, as a copy"
                )
    return found


def _children(pid: int) -> Iterator[int]:
    """The running child processes of a process, and theirs."""
    pids = [pid]
    for parent in pids:
        if len(pids) > _MAX_PROCESSES or pid == _INIT:
            break
        with suppress(OSError, ValueError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                pids += [int(child) for child in (task / "children").read_text().split()]
    return iter(pids[1:])


def _sockets_of(pid: int) -> set[int]:
    with suppress(OSError):
        return set(sockets_of_process(pid, at_most=_MAX_DESCRIPTORS)[1].values())
    return set()


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "gone"
