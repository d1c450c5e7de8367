"""Linux: processes and their descriptors, from /proc."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from closewait_guard._descriptor import OwnedDescriptor
from closewait_guard._outside._process import Process, program_of

__all__ = [
    "all_pids",
    "namespace_of",
    "parents",
    "protocol_of",
    "read",
    "sockets_of",
    "some_sockets_of",
    "user_of",
]

_PYTHON = re.compile(r"python(\d+\.\d+)")


def all_pids() -> list[int]:
    """Of all processes that this one can see."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def read(pid: int) -> Process:
    """A process with its sockets.

    Raises:
        ProcessLookupError: There is none of this number.
        PermissionError: Its descriptors may not be looked at.
    """
    try:
        used, sockets = sockets_of(pid)
        return Process(
            pid=pid,
            program=program(pid),
            python=_python(pid),
            parent=_parent(pid),
            fd_used=used,
            fd_limit=_fd_limit(pid),
            sockets=sockets,
        )
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None


def sockets_of(pid: int, likely: frozenset[int] | None = None) -> tuple[int, dict[int, int]]:
    """How many descriptors it has open; the inodes of those that are sockets.

    Args:
        pid: The process.
        likely: Look only at these of a process that has a great many.
    """
    folder = OwnedDescriptor(os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY))
    try:
        names = os.listdir(folder.fileno())  # noqa: PTH208 - pathlib reads no open folder
        wanted: Iterable[str] = names
        if likely is not None and len(names) > max(_FEW, len(likely)):
            wanted = {str(fd) for fd in likely}.intersection(names)
        sockets = _inodes(folder.fileno(), wanted)
    finally:
        folder.close()
    return len(names), sockets


_FEW = 200


def _inodes(folder: int, names: Iterable[str]) -> dict[int, int]:
    readlink = os.readlink
    sockets: dict[int, int] = {}
    for name in names:
        try:
            target = readlink(name, dir_fd=folder)
        except FileNotFoundError:
            # It has been closed since the folder was read.
            continue
        if target.startswith("socket:["):
            sockets[int(name)] = int(target[8:-1])
    return sockets


def some_sockets_of(
    pids: Iterable[int], likely: frozenset[int]
) -> Iterator[tuple[int, Mapping[int, int]]]:
    """Of those processes that may be looked into."""
    for pid in pids:
        with suppress(OSError):
            yield pid, sockets_of(pid, likely)[1]


def protocol_of(pid: int, fd: int) -> str | None:
    """`TCP`, `UDPv6`, `UNIX-STREAM`...; None for a descriptor that was closed meanwhile."""
    try:
        name = os.getxattr(f"/proc/{pid}/fd/{fd}", "system.sockprotoname")
    except OSError:
        return None
    return name.rstrip(b"\0").decode("ascii", "replace")


def program(pid: int) -> str:
    """What the process is called: without its arguments, which may hold secrets."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    told = program_of([word.decode(errors="backslashreplace") for word in words])
    return told or Path(f"/proc/{pid}/comm").read_text(errors="backslashreplace").strip()


def _python(pid: int) -> str:
    """The version of the interpreter by its file's name; empty for other programs."""
    try:
        found = _PYTHON.search(Path(f"/proc/{pid}/exe").readlink().name)
    except OSError:
        return ""
    return found[1] if found else ""


def _fd_limit(pid: int) -> int | None:
    with Path(f"/proc/{pid}/limits").open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("Max open files"):
                with suppress(ValueError, IndexError):
                    return int(line.split()[3])
    return None


def _parent(pid: int) -> int:
    # The program's name stands in brackets before the rest, and may hold anything.
    text = Path(f"/proc/{pid}/stat").read_text(errors="backslashreplace")
    return int(text.rpartition(")")[2].split()[1])


def parents() -> Iterator[tuple[int, int]]:
    """Each process and its parent."""
    for pid in all_pids():
        with suppress(OSError):
            yield pid, _parent(pid)


def user_of(pid: int) -> int:
    """The number of the user that the process runs as."""
    return Path(f"/proc/{pid}").stat().st_uid


def namespace_of(pid: int | str) -> int | None:
    """What tells one network from another; None where it may not be told."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return None
