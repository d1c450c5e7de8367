"""Files that other users cannot tamper with: read trusted files, append to a file, replace one."""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

from closewait_guard._descriptors import Identity, OwnedDescriptor, identity_of

__all__ = [
    "OutputFile",
    "ReplacedFile",
    "UntrustedFileError",
    "follow_path",
    "read_trusted",
    "read_untrusted",
    "refuse_writable_by_others",
]


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
_READER_TIMEOUT = 5.0
_MAX_ATTEMPTS = 10
_APPEND_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL
for _name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
    _APPEND_FLAGS |= getattr(os, _name, 0)
    _CREATE_FLAGS |= getattr(os, _name, 0)


class UntrustedFileError(Exception):
    """The file is not to be used; the text says why."""


def read_trusted(path: str) -> bytes:
    """Read a file that no other user could have written, up to a megabyte.

    The file, every folder above it, and every link on the way must belong to this user or to root,
    and no other user may write to them. In a folder with the sticky bit no other user can replace
    what belongs to this user or to root.

    Args:
        path: Absolute.

    Raises:
        UntrustedFileError: Another user may have changed it, or it is not a file of usual size.
        OSError: It cannot be read.
    """
    # Windows has neither these owners nor these modes.
    real = _last(follow_path(path, refuse_writable_by_others)) if hasattr(os, "geteuid") else path
    if not stat.S_ISREG(os.stat(real).st_mode):  # noqa: PTH116 - pathlib is slow to load
        raise UntrustedFileError(f"{real} is not a regular file")
    # By induction from the root no other user can replace `real` between the checks and this.
    fd = os.open(real, _READ_FLAGS | getattr(os, "O_NOFOLLOW", 0))
    try:
        status = os.fstat(fd)
        if hasattr(os, "geteuid"):
            refuse_writable_by_others(real, status)
        return _read_content(fd, real, status)
    finally:
        os.close(fd)


def read_untrusted(path: str) -> bytes:
    """Read a regular file, trusted or not: search its content, never act on it.

    Raises:
        UntrustedFileError: It is not a regular file of usual size.
        OSError: It cannot be read.
    """
    # Opening a device can have side effects. O_PATH has none, and pins the file that was checked.
    pinned = os.open(path, getattr(os, "O_PATH", _READ_FLAGS) | getattr(os, "O_CLOEXEC", 0))
    try:
        status = os.fstat(pinned)
        if not hasattr(os, "O_PATH"):
            return _read_content(pinned, path, status)
        if not stat.S_ISREG(status.st_mode):
            raise UntrustedFileError(f"{path} is not a regular file")
        fd = os.open(f"/proc/self/fd/{pinned}", _READ_FLAGS)
        try:
            return _read_content(fd, path, status)
        finally:
            os.close(fd)
    finally:
        os.close(pinned)


def _read_content(fd: int, path: str, status: os.stat_result) -> bytes:
    if not stat.S_ISREG(status.st_mode):
        raise UntrustedFileError(f"{path} is not a regular file")
    found = b""
    while len(found) <= _MAX_SIZE:
        part = os.read(fd, _MAX_SIZE + 1 - len(found))
        if not part:
            return found
        found += part
    raise UntrustedFileError(f"{path} is larger than {_MAX_SIZE:,} bytes")


def _last(entries: Iterator[str]) -> str:
    last = "/"
    for entry in entries:
        last = entry
    return last


def follow_path(path: str, check: Callable[[str, os.stat_result], None]) -> Iterator[str]:
    """Yield each folder on the way, from the root down, and the file; links are resolved here.

    Args:
        path: Absolute.
        check: Called with each folder, link and file before the walk goes through it.

    Raises:
        UntrustedFileError: Too many links lead there.
        OSError: There is no such path.
    """
    here, links = "/", 0
    check(here, os.lstat(here))
    remaining = path.split("/")[::-1]
    while remaining:
        name = remaining.pop()
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
        remaining += target.split("/")[::-1]


def refuse_writable_by_others(entry: str, status: os.stat_result) -> None:
    """Raise for what another user owns or may write."""
    mode = status.st_mode
    if status.st_uid not in (os.geteuid(), 0):
        raise UntrustedFileError(
            f"{entry} belongs to user {status.st_uid}, and this is user {os.geteuid()}"
        )
    # A link has no mode of its own. In a sticky folder only its owner can replace a file.
    if stat.S_ISLNK(mode) or (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
        return
    by_group = mode & stat.S_IWGRP and not _is_private_group(entry, status.st_gid)
    if mode & stat.S_IWOTH or by_group:
        raise UntrustedFileError(f"other users may write to {entry}")


def _is_private_group(entry: str, gid: int) -> bool:
    """Whether it is the group that many systems give to each user, with no other member."""
    # Processes that have given up root, and many users of containers, are still in group 0.
    if gid == 0:
        return False
    # With an access control list, the group's bits are those of all users named in it.
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


class OutputFile:
    """A file to append lines to, recognized by its identity.

    The program may close our descriptor, and its number may then stand for a file of its own.

    A regular file is opened by its name, and created with mode 0600. It is refused if it is a
    link, if another user's link leads to it, or if others may write to its directory and it may be
    one of theirs. `/dev/stdout`, `/dev/stderr` and `/dev/fd/N` are descriptors of this process,
    whatever they lead to; pipes and devices with names of their own are refused, because opening
    them may block.

    Raises:
        OSError: The file cannot be opened.
        TypeError, ValueError: The path is none.
    """

    def __init__(self, path: str | bytes | os.PathLike[str]) -> None:
        # Absolute, because the program may change its directory.
        self.path = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - it may be bytes
        self._number = _fd_in_path(self.path)
        self._identity: Identity | None = None
        self._is_torn = False
        self._open_file = self._open()

    @property
    def has_name(self) -> bool:
        """Whether it is a file in a folder, which can be moved away and locked."""
        return self._number is None

    def reopen(self) -> None:
        """Open what the path names now."""
        self.close()
        self._open_file = self._open()

    def _open(self) -> OwnedDescriptor:
        fd = _open_by_name(self.path) if self._number is None else os.dup(self._number)
        opened = OwnedDescriptor(fd)
        identity = identity_of(opened.fileno())
        if self._number is not None and self._identity not in (None, identity):
            opened.close()
            raise OSError(errno.EBADF, "the descriptor now refers to another file", self.path)
        self._identity = identity
        return opened

    def close(self) -> None:
        """Close the descriptor, if it is still ours."""
        self._open_file.close()

    def fileno(self) -> int:
        """The descriptor; -1 if the program has closed it."""
        return self._open_file.fileno()

    def is_current(self) -> bool:
        """Whether it is open, and no other file has taken its place under its name."""
        if self._number is not None or self.fileno() < 0:
            return self.fileno() >= 0
        try:
            status = os.lstat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino, stat.S_IFMT(status.st_mode)) == self._identity

    def append(self, line: bytes) -> None:
        """Add a line; if it does not fit, no byte of it stays in the file.

        Raises:
            OSError: It could not be written.
        """
        if self.has_name:
            self._append_to_file(line)
        else:
            self._send(line)

    def clear(self) -> None:
        """Truncate the file, unless it is a descriptor that the program writes to as well."""
        if self.has_name:
            os.ftruncate(self.fileno(), 0)

    def _append_to_file(self, line: bytes) -> None:
        fd = self.fileno()
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            # Another writer was killed in the middle of a line.
            line = b"\n" + line
        rest = memoryview(line)
        try:
            while rest:
                # All at once, unless the disk is full: then the second attempt says so.
                rest = rest[os.write(self.fileno(), rest) :]
        finally:
            if 0 < len(rest) < len(line):
                os.ftruncate(self.fileno(), size)

    def _send(self, line: bytes) -> None:
        """Write to a pipe; after a torn line, which cannot be taken back, begin with a newline."""
        rest = memoryview(b"\n" + line if self._is_torn else line)
        try:
            while rest:
                try:
                    rest = rest[os.write(self.fileno(), rest) :]
                    self._is_torn = True
                except BlockingIOError:
                    _wait_for_reader(self.fileno())
        finally:
            self._is_torn = self._is_torn and bool(rest)


class ReplacedFile:
    """A file that is written as a whole: whoever reads it finds what it was before, or all of it.

    It has mode 0600. What is refused as an `OutputFile` is refused here, already before there is
    anything to write.

    Raises:
        OSError: The file cannot be written.
        TypeError, ValueError: The path is none.
    """

    def __init__(self, path: str | bytes | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - it may be bytes
        if _fd_in_path(self.path) is None:
            folder = os.path.dirname(self._resolve())  # noqa: PTH120 - the path is text
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.path)

    def _resolve(self) -> str:
        """The file that is meant, or that is to be there."""
        real = _resolve_folders(self.path)
        with suppress(FileNotFoundError):
            _refuse_unless_regular(os.lstat(real), self.path)
        return real

    def write(self, data: bytes) -> None:
        """Put the data in the file's place.

        Raises:
            OSError: It could not be written; then the file is as it was.
        """
        if _fd_in_path(self.path) is not None:
            stream = OutputFile(self.path)
            stream.append(data)
            stream.close()
            return
        real = self._resolve()
        folder, name = os.path.split(real)
        unfinished = os.path.join(folder, f".closewait-guard-{os.urandom(8).hex()}")  # noqa: PTH118
        fd = os.open(unfinished, _CREATE_FLAGS, 0o600)
        try:
            with open(fd, "wb") as file:  # noqa: PTH123
                file.write(data)
            os.replace(unfinished, os.path.join(folder, name))  # noqa: PTH105, PTH118
        except BaseException:
            os.unlink(unfinished)  # noqa: PTH108
            raise


def _fd_in_path(path: str) -> int | None:
    """The descriptor that a path such as /dev/fd/1 stands for, if it is such a path."""
    for name, number in (("/dev/stdout", 1), ("/dev/stderr", 2)):
        if path == name:
            return number
    folder, _, name = path.rpartition("/")
    if folder in ("/dev/fd", "/proc/self/fd") and name.isascii() and name.isdecimal():
        return int(name)
    return None


def _open_by_name(path: str) -> int:
    # Another process that writes to the file may rename it, full, while it is opened.
    for _ in range(_MAX_ATTEMPTS):
        with ExitStack() as stack:
            fd = _open_regular(path)
            stack.callback(os.close, fd)
            if _is_named(fd, path):
                stack.pop_all()
                return fd
    raise PermissionError(errno.EPERM, "the file at this path is being replaced", path)


def _open_regular(path: str) -> int:
    real = _resolve_folders(path)
    with suppress(FileNotFoundError):
        # Even opening a pipe would wake a reader that waits for a writer.
        _refuse_unless_regular(os.lstat(real), path)
    fd = os.open(real, _APPEND_FLAGS, 0o600)
    try:
        status = os.fstat(fd)
        _refuse_unless_regular(status, path)
        if hasattr(os, "geteuid"):
            _refuse_if_foreign(status, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_named(fd: int, path: str) -> bool:
    """Whether the path leads to the open file; not if a folder has become a link meanwhile."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.lstat(_resolve_folders(path)))
    return False


def _resolve_folders(path: str) -> str:
    """Resolve the links among the folders of a path; the last part is left as it is."""
    if not hasattr(os, "geteuid"):
        return path
    folder, _, name = path.rpartition("/")
    try:
        folders = ["/", *follow_path(folder, _refuse_link_of_others)]
    except UntrustedFileError as error:
        raise PermissionError(errno.EPERM, str(error), path) from None
    return os.path.join(folders[-1], name)  # noqa: PTH118 - the path is text


def _refuse_link_of_others(entry: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode) and status.st_uid not in (0, os.geteuid()):
        raise UntrustedFileError(
            f"{entry} is a link of user {status.st_uid}, who can change its target"
        )


def _refuse_unless_regular(status: os.stat_result, path: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, "it is a symbolic link: name the file itself", path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", path)


def _refuse_if_foreign(status: os.stat_result, path: str) -> None:
    """Raise if others may write to the folder and may have put the file there for us to fill."""
    folder = os.stat(os.path.dirname(path))  # noqa: PTH116, PTH120 - the path is text
    trusted = {0, os.geteuid()}
    is_shared = bool(folder.st_mode & stat.S_IWOTH)
    if not is_shared and folder.st_uid in trusted:
        return
    # The folder's owner can read what belongs to that user in any case.
    owners = trusted if is_shared else trusted | {folder.st_uid}
    if status.st_uid not in owners:
        reason = f"it belongs to user {status.st_uid}"
    elif status.st_mode & stat.S_IWOTH:
        reason = "it is world-writable"
    elif status.st_nlink > 1:
        reason = "it has another hard link"
    else:
        return
    raise PermissionError(errno.EPERM, f"{reason}, and others may write to its directory", path)


def _wait_for_reader(fd: int) -> None:
    """Wait until a pipe that the program has made non-blocking can be written to."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if not poll.poll(_READER_TIMEOUT * 1000):
        raise TimeoutError(errno.ETIMEDOUT, "timed out: the other end does not read")
