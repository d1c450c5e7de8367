"""The reporter `json_lines`: one report a line, appended to a file that processes may share."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from closewait_guard._config import count, require_number, whole_number_parser
from closewait_guard._files import OutputFile
from closewait_guard._render import to_dict, with_examples
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Report, Reporter

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "json_lines",
]


_MEGABYTE = 1024 * 1024
# Each time, another process has put a new file in place of the one that was open.
_MAX_REPLACEMENTS = 100


def json_lines(
    path: str | os.PathLike[str],
    max_bytes: int = 50 * _MEGABYTE,
    backups: int = 3,
    examples: int = 5,
) -> Reporter:
    r"""Append each report to a file as one line of JSON, by the schema in the package.

    Lines of several processes are never mixed, and a line that does not fit on the disk leaves
    none of its bytes behind. The file stays open, so that a report can be written when the process
    has no descriptor left.

    Args:
        path: The file; created with mode 0600. `/dev/stdout`, `/dev/stderr` and `/dev/fd/N` are
            descriptors of the program; any other name of a pipe or device is refused, and a link.
        max_bytes: A report that would make the file larger goes to a new one; 0 for no limit.
        backups: How many full files to keep, as `path.1`, `path.2` and so on.
        examples: How many leaks of one site to write, the oldest; the first of them has the
            `count` of all. 0 for every one. By name: `json_lines:examples=1:PATH`.

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
    size = whole_number_parser("a non-negative integer", lambda number: number >= 0)
    return _JsonLines(
        path,
        require_number(size, max_bytes, "json_lines: max_bytes"),
        require_number(count, backups, "json_lines: backups"),
        require_number(count, examples, "json_lines: examples"),
    )


class _JsonLines:
    def __init__(
        self, path: str | os.PathLike[str], max_bytes: int, backups: int, examples: int
    ) -> None:
        self._examples = examples
        self._max_bytes = max_bytes
        self._backups = backups
        self._pid = os.getpid()
        self._write_lock = threading.RLock()
        try:
            self._file = OutputFile(path)
        except (OSError, TypeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"json_lines: {path!r} cannot be opened: {reason}") from error

    def __call__(self, report: Report, /) -> None:
        if self._examples:
            report = with_examples(report, self._examples)
        line = json.dumps(to_dict(report), separators=(",", ":")).encode() + b"\n"
        if self._pid != os.getpid():
            # A file lock belongs to an open file, so a forked child must open its own. And a thread
            # that the child does not have may have held our lock.
            self._write_lock = threading.RLock()
            self._file.close()
            self._pid = os.getpid()
        with self._write_lock:
            self._write(line)

    def close(self) -> None:
        with self._write_lock:
            self._file.close()

    def __del__(self) -> None:
        with suppress(AttributeError):
            self._file.close()

    def __repr__(self) -> str:
        return f"json_lines({self._file.path!r})"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the file that the path names now."""
        for _ in range(_MAX_REPLACEMENTS):
            if not self._file.is_current():
                self._file.reopen()
            _lock(self._file)
            if self._file.is_current():
                break
            _unlock(self._file)
        try:
            yield
        finally:
            _unlock(self._file)

    def _write(self, line: bytes) -> None:
        for attempt in range(_MAX_REPLACEMENTS):
            with self._locked():
                if attempt == _MAX_REPLACEMENTS - 1 or self._has_room(len(line)):
                    self._file.append(line)
                    return
                try:
                    self._rotate()
                except OSError:
                    # Too large a file is better than a lost report, and the error is logged.
                    self._file.append(line)
                    raise

    def _has_room(self, coming: int) -> bool:
        if not self._max_bytes or not self._file.has_name:
            return True
        size = os.fstat(self._file.fileno()).st_size
        return not size or size + coming <= self._max_bytes

    def _rotate(self) -> None:
        """Rename the full file; the next process to write creates the new one."""
        if not self._backups:
            os.ftruncate(self._file.fileno(), 0)
            return
        path = self._file.path
        for number in range(self._backups, 0, -1):
            older = f"{path}.{number - 1}" if number > 1 else path
            with suppress(FileNotFoundError):
                os.replace(older, f"{path}.{number}")  # noqa: PTH105


def _lock(file: OutputFile) -> None:
    # A lock on a descriptor that the program shares would be the program's lock.
    if fcntl is not None and file.has_name:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)


def _unlock(file: OutputFile) -> None:
    if fcntl is not None and file.has_name and file.fileno() >= 0:
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)
