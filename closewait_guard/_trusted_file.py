"""Who may have a hand in a file: read one only if no other user could have written it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress

__all__ = ["UntrustedFileError", "entries_on_the_way", "peek", "read_trusted"]

_MAX_SIZE = 1 << 20
# As the kernel does.
_MAX_LINKS = 40
_READ_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
)


class UntrustedFileError(Exception):
    """The file is not to be used; the text says why."""


def read_trusted(path: str) -> bytes:
    """What a file contains, up to a megabyte.

    The file, every folder above it, and every link on the way must belong to this user or to root,
    and nobody else may write to them. In a folder with the sticky bit nobody can replace what
    belongs to this user or to root.

    Args:
        path: Absolute.

    Raises:
        UntrustedFileError: Another user may have a hand in it, or it is no file of usual size.
        OSError: It cannot be read.
    """
    # Windows has neither these owners nor these modes.
    real = _last_of(entries_on_the_way(path, _check)) if hasattr(os, "geteuid") else path
    if not stat.S_ISREG(os.stat(real).st_mode):  # noqa: PTH116 - pathlib is slow to load
        raise UntrustedFileError(f"{real} is not a regular file")
    # By induction from the root nobody else can exchange `real` between the checks and this.
    fd = os.open(real, _READ_FLAGS | getattr(os, "O_NOFOLLOW", 0))
    try:
        status = os.fstat(fd)
        if hasattr(os, "geteuid"):
            _check(real, status)
        return _content(fd, real, status)
    finally:
        os.close(fd)


def peek(path: str) -> bytes:
    """What a regular file contains, trusted or not; only to be searched, never to be obeyed.

    Raises:
        UntrustedFileError: It is no regular file of usual size.
        OSError: It cannot be read.
    """
    # The mere opening of a device can have effects. O_PATH has none, and pins what was looked at.
    pinned = os.open(path, getattr(os, "O_PATH", _READ_FLAGS) | getattr(os, "O_CLOEXEC", 0))
    try:
        status = os.fstat(pinned)
        if not hasattr(os, "O_PATH"):
            return _content(pinned, path, status)
        if not stat.S_ISREG(status.st_mode):
            raise UntrustedFileError(f"{path} is not a regular file")
        fd = os.open(f"/proc/self/fd/{pinned}", _READ_FLAGS)
        try:
            return _content(fd, path, status)
        finally:
            os.close(fd)
    finally:
        os.close(pinned)


def _content(fd: int, path: str, status: os.stat_result) -> bytes:
    if not stat.S_ISREG(status.st_mode):
        raise UntrustedFileError(f"{path} is not a regular file")
    found = b""
    while len(found) <= _MAX_SIZE:
        part = os.read(fd, _MAX_SIZE + 1 - len(found))
        if not part:
            return found
        found += part
    raise UntrustedFileError(f"{path} is larger than {_MAX_SIZE:,} bytes")


def _last_of(entries: Iterator[str]) -> str:
    last = "/"
    for entry in entries:
        last = entry
    return last


def entries_on_the_way(path: str, check: Callable[[str, os.stat_result], None]) -> Iterator[str]:
    """Each folder on the way, from the root down, and the file; links are followed by hand.

    Args:
        path: Absolute.
        check: Called with each folder, link and file before it is gone through.

    Raises:
        UntrustedFileError: Too many links lead there.
        OSError: There is no such way.
    """
    here, links = "/", 0
    check(here, os.lstat(here))
    waiting = path.split("/")[::-1]
    while waiting:
        name = waiting.pop()
        if name == "..":
            here = os.path.dirname(here)  # noqa: PTH120
        if name in ("", ".", ".."):
            continue
        entry = os.path.join(here, name)  # noqa: PTH118
        status = os.lstat(entry)
        check(entry, status)
        if not stat.S_ISLNK(status.st_mode):
            here = entry
            yield here
            continue
        links += 1
        if links > _MAX_LINKS:
            raise UntrustedFileError(f"too many links lead to {path}")
        target = os.readlink(entry)  # noqa: PTH115
        here = "/" if target.startswith("/") else here
        waiting += target.split("/")[::-1]


def _check(entry: str, status: os.stat_result) -> None:
    """Refuse what another user owns or may write."""
    mode = status.st_mode
    if status.st_uid not in (os.geteuid(), 0):
        raise UntrustedFileError(
            f"{entry} belongs to user {status.st_uid}, and this is user {os.geteuid()}"
        )
    # A link has no mode of its own. What lies in a sticky folder only its owner can replace.
    if stat.S_ISLNK(mode) or (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
        return
    by_group = mode & stat.S_IWGRP and not _is_private(entry, status.st_gid)
    if mode & stat.S_IWOTH or by_group:
        raise UntrustedFileError(f"other users may write to {entry}")


def _is_private(entry: str, gid: int) -> bool:
    """Whether it is the group that many systems give to each user, with nobody else in it."""
    # Processes that have given up root, and many users of containers, are still in group 0.
    if gid == 0:
        return False
    # With an access control list, the group's bits are those of everybody named in it.
    with suppress(OSError, AttributeError):
        os.getxattr(entry, "system.posix_acl_access")
        return False
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}
