"""One report a line, appended to a file that several processes may share."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from closewait_guard._serial import to_dict
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Report, Reporter

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["json_lines"]

_MEGABYTE = 1024 * 1024
# Each time, another process has put a new file in the place of the one that was open.
_MOST_REPLACEMENTS = 100


def json_lines(
    path: str | os.PathLike[str], max_bytes: int = 50 * _MEGABYTE, backups: int = 3
) -> Reporter:
    r"""Append each report to a file as one line of JSON, after the schema in the package.

    Lines of several processes are never mixed, and a line that does not fit on the disk leaves
    none of its bytes behind. The file stays open, so that a report can be told when the process
    has no descriptor left.

    Args:
        path: The file; made with mode 0600.
        max_bytes: A report that would make the file larger goes to a new one; 0 for no limit.
        backups: How many full files to keep, as `path.1`, `path.2` and so on.

    Raises:
        ConfigurationError: The file cannot be opened, or a number is no number.

    Example:
        >>> import pathlib, tempfile
        >>> from closewait_guard import Guard
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Guard(reporters=[json_lines(folder + "/leaks.jsonl")]) as guard:
        ...         _ = guard.report()
        ...     pathlib.Path(folder, "leaks.jsonl").read_text().count("\n")
        1
    """
    for name, number in (("max_bytes", max_bytes), ("backups", backups)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ConfigurationError(
                f"json_lines: {name} must be a whole number, zero or more, not {number!r}"
            )
    return _JsonLines(path, max_bytes, backups)


class _JsonLines:
    def __init__(self, path: str | os.PathLike[str], max_bytes: int, backups: int) -> None:
        self._max_bytes = max_bytes
        self._backups = backups
        self._fd = -1
        self._pid = os.getpid()
        self._file = (0, 0)
        self._one_at_a_time = threading.RLock()
        try:
            # Absolute, because the program may change its directory.
            self._path = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - it may be bytes
            self._open()
        except (OSError, TypeError, ValueError) as error:
            raise ConfigurationError(f"json_lines: {path!r} cannot be opened: {error}") from error

    def __call__(self, report: Report, /) -> None:
        line = json.dumps(to_dict(report), separators=(",", ":")).encode() + b"\n"
        if self._pid != os.getpid():
            # A lock belongs to an opened file: a forked child must open its own. And a thread
            # that the child does not have may have been in the middle of a line.
            self._one_at_a_time = threading.RLock()
            self._let_go()
            self._pid = os.getpid()
        with self._one_at_a_time:
            self._write(line)

    def close(self) -> None:
        with self._one_at_a_time:
            self._let_go()

    def __del__(self) -> None:
        with suppress(AttributeError):
            self._let_go()

    def _let_go(self) -> None:
        fd, self._fd = self._fd, -1
        # A program that makes itself a daemon closes every number it knows nothing of, and ours
        # may be somebody else's by now.
        with suppress(OSError):
            if fd >= 0 and _identity(os.fstat(fd)) == self._file:
                os.close(fd)

    def __repr__(self) -> str:
        return f"json_lines({self._path!r})"

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        fd = os.open(self._path, flags | getattr(os, "O_NONBLOCK", 0), 0o600)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", self._path)
        self._fd, self._file = fd, _identity(os.fstat(fd))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file that the path names now."""
        for _ in range(_MOST_REPLACEMENTS):
            if self._fd < 0 or not self._is_current():
                self._let_go()
                self._open()
            _lock(self._fd)
            if self._is_current():
                break
            _unlock(self._fd)
        try:
            yield
        finally:
            _unlock(self._fd)

    def _is_current(self) -> bool:
        """Whether the file has not been moved away, by us or by anybody else."""
        try:
            named, opened = os.stat(self._path), os.fstat(self._fd)  # noqa: PTH116
        except OSError:
            return False
        return _identity(named) == _identity(opened) == self._file

    def _write(self, line: bytes) -> None:
        for attempt in range(_MOST_REPLACEMENTS):
            with self._locked():
                if attempt == _MOST_REPLACEMENTS - 1 or self._has_room(len(line)):
                    self._append(line)
                    return
                try:
                    self._rotate()
                except OSError:
                    # Too large a file is better than a lost report, and the reason is told.
                    self._append(line)
                    raise

    def _has_room(self, coming: int) -> bool:
        size = os.fstat(self._fd).st_size
        return not self._max_bytes or not size or size + coming <= self._max_bytes

    def _rotate(self) -> None:
        """Move the full file out of the way; whoever comes first makes the new one."""
        if not self._backups:
            os.ftruncate(self._fd, 0)
            return
        for number in range(self._backups, 0, -1):
            older = f"{self._path}.{number - 1}" if number > 1 else self._path
            with suppress(FileNotFoundError):
                os.replace(older, f"{self._path}.{number}")  # noqa: PTH105

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            # Somebody else's writer was killed in the middle of a line.
            line = b"\n" + line
        rest = memoryview(line)
        try:
            while rest:
                # All at once, unless the disk is full: then the second attempt says so.
                rest = rest[os.write(self._fd, rest) :]
        finally:
            if 0 < len(rest) < len(line):
                os.ftruncate(self._fd, size)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_ino, status.st_dev


def _lock(fd: int) -> None:
    if fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_EX)


def _unlock(fd: int) -> None:
    if fcntl is not None and fd >= 0:
        fcntl.flock(fd, fcntl.LOCK_UN)
