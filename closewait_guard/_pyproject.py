"""Which project file counts, and whether it may be believed.

Light: the pytest plugin asks before it loads anything else.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["UntrustedFileError", "nearest_pyproject", "read_trusted"]

# No project file comes near it, and a reader must not be kept busy by one that does.
_MAX_BYTES = 1_000_000
_FLAGS = os.O_RDONLY
for _name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
    _FLAGS |= getattr(os, _name, 0)


class UntrustedFileError(Exception):
    """Somebody else decides, or may decide, what is in the file. The text says who."""


def nearest_pyproject(directory: Path) -> Path | None:
    """That of a folder, or of the first above it that has one."""
    try:
        here = directory.resolve()
    except (OSError, RuntimeError):
        return None
    candidates = (folder / "pyproject.toml" for folder in (here, *here.parents))
    return next((path for path in candidates if _is_there(path)), None)


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # A folder that this user may not look into: it is not their project.
        return False


def read_trusted(path: Path) -> bytes:
    """The content of a file that nobody but the user and root can have written.

    Args:
        path: Absolute, its folders without links; the file itself may be one.

    Raises:
        UntrustedFileError: Somebody else owns it or one of its folders, or may write there.
        OSError: It cannot be read.
    """
    real = path.resolve()
    if hasattr(os, "geteuid"):
        # From the top down: where nobody else may write so far, nobody can change what follows.
        for folder in dict.fromkeys((*reversed(path.parents), *reversed(real.parents))):
            _check(os.lstat(folder), str(folder))
        _check_owner(os.lstat(path), "it")
    with os.fdopen(os.open(real, _FLAGS), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        if hasattr(os, "geteuid"):
            _check(status, "it")
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {_MAX_BYTES:,} bytes")
    return content


def _check(status: os.stat_result, name: str) -> None:
    _check_owner(status, name)
    # In a sticky folder, such as /tmp, nobody can replace what belongs to another.
    is_sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    if not is_sticky and _others_may_write(status):
        raise UntrustedFileError(f"other users may write to {name}")


def _check_owner(status: os.stat_result, name: str) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise UntrustedFileError(
            f"{name} belongs to user {status.st_uid}, and this is user {os.geteuid()}"
        )


def _others_may_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_private_group(status.st_gid)


def _is_private_group(number: int) -> bool:
    """Whether it is the group that many systems give to each user, with nobody else in it."""
    import grp
    import pwd

    try:
        group = grp.getgrgid(number)
        names = {pwd.getpwuid(user).pw_name for user in (0, os.geteuid())}
    except KeyError:
        return False
    return group.gr_name in names and names.issuperset(group.gr_mem)
