"""A report cut down to some examples of each site, with the numbers of all: pure.

One report a line, appended to a file that several processes may share.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TypeVar

from closewait_guard._config import shown
from closewait_guard._files import OutputFile
from closewait_guard._render import to_dict
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import ClosedLate, Finding, Report, Reporter, site_key

__all__ = [
    "json_lines",
    "with_examples",
]


_Item = TypeVar("_Item", Finding, ClosedLate)


def with_examples(report: Report, most: int) -> Report:
    """At most so many leaks of each site: those that have been useless for the longest.

    The first of them counts those that were left out. Without a stack nothing but the peers tells
    one site from another, so that all of those are kept.
    """
    return replace(
        report,
        findings=_some(report.findings, most, lambda leak: leak, _age, _standing_for),
        closed_late=_some(
            report.closed_late,
            most,
            lambda closed: closed.finding,
            lambda closed: closed.after,
            lambda closed, count: replace(closed, finding=_standing_for(closed.finding, count)),
        ),
    )


def _some(
    items: Sequence[_Item],
    most: int,
    leak_of: Callable[[_Item], Finding],
    age_of: Callable[[_Item], float],
    standing_for: Callable[[_Item, int], _Item],
) -> tuple[_Item, ...]:
    groups: dict[object, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(site_key(leak_of(item)), []).append(place)
    kept: dict[int, _Item] = {}
    for places in groups.values():
        if len(places) > most and leak_of(items[places[0]]).observation.record.site is not None:
            total = sum(leak_of(items[place]).count for place in places)
            oldest = sorted(places, key=lambda place: -age_of(items[place]))[:most]
            others = sum(leak_of(items[place]).count for place in oldest[1:])
            kept[oldest[0]] = standing_for(items[oldest[0]], total - others)
        else:
            oldest = places
        for place in oldest:
            kept.setdefault(place, items[place])
    return tuple(kept[place] for place in sorted(kept))


def _age(leak: Finding) -> float:
    return leak.observation.ended_for


def _standing_for(leak: Finding, count: int) -> Finding:
    return replace(leak, count=count)


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_MEGABYTE = 1024 * 1024
# Each time, another process has put a new file in the place of the one that was open.
_MOST_REPLACEMENTS = 100


def json_lines(
    path: str | os.PathLike[str],
    max_bytes: int = 50 * _MEGABYTE,
    backups: int = 3,
    examples: int = 50,
) -> Reporter:
    r"""Append each report to a file as one line of JSON, after the schema in the package.

    Lines of several processes are never mixed, and a line that does not fit on the disk leaves
    none of its bytes behind. The file stays open, so that a report can be told when the process
    has no descriptor left.

    Args:
        path: The file; made with mode 0600. `/dev/stdout`, `/dev/stderr` and `/dev/fd/N` are
            descriptors that the program has; no other name of a pipe or device will do, nor a link.
        max_bytes: A report that would make the file larger goes to a new one; 0 for no limit.
        backups: How many full files to keep, as `path.1`, `path.2` and so on.
        examples: How many leaks of one site to write, the oldest; the first of them has the
            `count` of all. 0 for every one.

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
    numbers = {"max_bytes": max_bytes, "backups": backups, "examples": examples}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ConfigurationError(
                f"json_lines: {name} must be a whole number, zero or more, not {shown(number)}"
            )
    return _JsonLines(path, max_bytes, backups, examples)


class _JsonLines:
    def __init__(
        self, path: str | os.PathLike[str], max_bytes: int, backups: int, examples: int
    ) -> None:
        self._examples = examples
        self._max_bytes = max_bytes
        self._backups = backups
        self._pid = os.getpid()
        self._one_at_a_time = threading.RLock()
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
            # A lock belongs to an opened file: a forked child must open its own. And a thread
            # that the child does not have may have been in the middle of a line.
            self._one_at_a_time = threading.RLock()
            self._file.close()
            self._pid = os.getpid()
        with self._one_at_a_time:
            self._write(line)

    def close(self) -> None:
        with self._one_at_a_time:
            self._file.close()

    def __del__(self) -> None:
        with suppress(AttributeError):
            self._file.close()

    def __repr__(self) -> str:
        return f"json_lines({self._file.path!r})"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file that the path names now."""
        for _ in range(_MOST_REPLACEMENTS):
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
        for attempt in range(_MOST_REPLACEMENTS):
            with self._locked():
                if attempt == _MOST_REPLACEMENTS - 1 or self._has_room(len(line)):
                    self._file.append(line)
                    return
                try:
                    self._rotate()
                except OSError:
                    # Too large a file is better than a lost report, and the reason is told.
                    self._file.append(line)
                    raise

    def _has_room(self, coming: int) -> bool:
        if not self._max_bytes or not self._file.has_name:
            return True
        size = os.fstat(self._file.fileno()).st_size
        return not size or size + coming <= self._max_bytes

    def _rotate(self) -> None:
        """Move the full file out of the way; whoever comes first makes the new one."""
        if not self._backups:
            os.ftruncate(self._file.fileno(), 0)
            return
        path = self._file.path
        for number in range(self._backups, 0, -1):
            older = f"{path}.{number - 1}" if number > 1 else path
            with suppress(FileNotFoundError):
                os.replace(older, f"{path}.{number}")  # noqa: PTH105


def _lock(file: OutputFile) -> None:
    # Of a descriptor that the program has, too, a lock would be the program's.
    if fcntl is not None and file.has_name:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)


def _unlock(file: OutputFile) -> None:
    if fcntl is not None and file.has_name and file.fileno() >= 0:
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)
