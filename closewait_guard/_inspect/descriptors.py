"""What every open descriptor is, socket or not: how many of each kind, and of what files.

No descriptor is needed for it. Where none is left to list the others with, the numbers are asked
one after another.
"""

from __future__ import annotations

import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from closewait_guard._clock import now
from closewait_guard._descriptors import (
    Identity,
    OwnedDescriptor,
    fd_used,
    is_owned,
    numbers_to_try,
)
from closewait_guard._enums import is_about_descriptors
from closewait_guard._format import pluralize
from closewait_guard._interruptions import refusals
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import DescriptorKind, Descriptors, Report

if TYPE_CHECKING:
    from closewait_guard._capture import CreationTuple, Registry
    from closewait_guard._libraries import OwnerKind

__all__ = [
    "DescriptorCounter",
    "DescriptorsOfBlock",
    "count_descriptors",
    "descriptors_of_process",
    "open_descriptors",
]


# The share of the time that counting may take where there are many, and where they run out.
_MAX_SHARE, _MAX_SHARE_NAMED, _FEW = 0.001, 0.05, 1000


class DescriptorCounter:
    """Counts the descriptors of this process; a count that took long is good for a while.

    Args:
        registry: Knows what has most of them.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        # With names, too, once there have been some.
        self._last: dict[bool, _Count] = {}

    def add_to(self, report: Report, *, named: bool = False, afresh: bool = False) -> Report:
        """The report with all descriptors.

        Args:
            report: One that has none, or not their names.
            named: Say what is open most often.
            afresh: Count now, however many there are.
        """
        started, last = now(), self._last.get(named)
        if last is not None and started < last.good_until and not afresh:
            found = replace(last.found, counted_for=started - last.at)
            return replace(report, fd_used=fd_used(), descriptors=found)
        counted = count_descriptors(named=named)
        if counted is None:
            return _with_count_only(report)
        if named:
            counted = replace(counted, owners=_owners_by_kind(self._registry))
        done = now()
        share = _MAX_SHARE_NAMED if named else _MAX_SHARE
        pause = (done - started) / share if counted.total > _FEW else 0.0
        self._last[named] = _Count(counted, started, done + pause)
        return replace(report, fd_used=counted.total, descriptors=counted)

    def name_if_exhausted(self, report: Report) -> Report:
        """With what is open most often, where an alert says that descriptors run out."""
        is_exhausted = any(is_about_descriptors(alert.kind, alert.data) for alert in report.alerts)
        return self.add_to(report, named=True) if is_exhausted else report


class _Alike(NamedTuple):
    """Owners of one kind that were made alike, and the descriptors that they have, by kind."""

    creation: CreationTuple
    kind: OwnerKind
    serials: list[int]
    held: Counter[str]

    def add(self, other: _Alike) -> None:
        self.serials.extend(other.serials)
        self.held.update(other.held)


def _owners_by_kind(
    registry: Registry, opened_after: int = 0, among: Container[int] | None = None
) -> dict[str, dict[str, int]]:
    """By kind, what has most of the descriptors that are not sockets, and how many.

    Args:
        registry: Knows what has them.
        opened_after: A mark; what was made before it is passed over.
        among: Of these numbers only; then all that has any.
    """
    # From outside, nothing that records is loaded.
    from closewait_guard._capture import SERIAL, STACK, intern

    table, alike = registry.owners, dict[object, _Alike]()
    for owner, (creation, kind) in table.open_owners() if table is not None else ():
        with suppress(Exception):
            if creation[SERIAL] <= opened_after:
                continue
            held = Counter(
                each.value for each, fd in kind.descriptors(owner) if among is None or fd in among
            )
            if among is not None and not held:
                continue
            intern(creation[STACK])
            key = kind, *map(id, creation[STACK])
            group = alike.setdefault(key, _Alike(creation, kind, [], Counter()))
            group.serials.append(creation[SERIAL])
            group.held.update(held)
    found: dict[str, dict[str, int]] = {}
    by_line = _merge_by_line(alike.values(), registry.pid)
    for place, group in sorted(by_line, key=lambda each: -each[1].held.total()):
        for each, number in group.held.items():
            if len(named := found.setdefault(each, {})) < _MAX_NAMES or among is not None:
                named[_name_of(group, place)] = number
    return found


def _merge_by_line(groups: Iterable[_Alike], pid: int) -> Iterable[tuple[str | None, _Alike]]:
    """One group for each kind and line, whatever has called it."""
    from closewait_guard._inspect.records import record_of

    by_line: dict[tuple[OwnerKind, str | None], _Alike] = {}
    for group in groups:
        site = record_of(group.creation, pid).site
        key = group.kind, None if site is None else site.place
        if (known := by_line.setdefault(key, group)) is not group:
            known.add(group)
    return [(place, group) for (_, place), group in by_line.items()]


def _name_of(group: _Alike, place: str | None) -> str:
    """`30 subprocess.Popen opened at run.py:9`."""
    name, number = group.kind.name, len(group.serials)
    # A phrase has a plural, a class has not.
    what = pluralize(number, name) if " " in name else f"{number:,} {name}"
    return what if place is None else f"{what} opened at {place}"


class _Count(NamedTuple):
    found: Descriptors
    at: float
    good_until: float


def _with_count_only(report: Report) -> Report:
    used, coverage = fd_used(), report.coverage
    if used is not None:
        note = f"what the {used:,} descriptors are, which cannot be listed"
        coverage = replace(coverage, notes=(*coverage.notes, note))
    return replace(report, fd_used=used, coverage=coverage)


def count_descriptors(*, named: bool) -> Descriptors | None:
    """All descriptors of this process; None where they cannot be found out."""
    tally = _Tally()
    try:
        for fd, status in open_descriptors():
            tally.add(fd, status, named=named)
    except Exception as error:
        refusals.note(error)
        return None
    return tally.result(_link_of)


def descriptors_of_process(pid: int) -> tuple[dict[int, int], Descriptors]:
    """The inodes of the sockets of a process, and all that it has open. Linux only.

    Raises:
        OSError: It has ended, or may not be looked into.
    """
    sockets: dict[int, int] = {}
    tally, links = _Tally(), dict[int, str]()
    folder = OwnedDescriptor(os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY))
    try:
        fd, readlink = folder.fileno(), os.readlink
        for name in os.listdir(fd):  # noqa: PTH208 - pathlib reads no open folder
            try:
                link = readlink(name, dir_fd=fd)
                # Before all other kinds: there may be many thousands.
                if link.startswith("socket:["):
                    sockets[int(name)] = int(link[8:-1])
                    continue
                kind = _kind_of_link(link, _OTHER)
                if kind is _OTHER:
                    status = os.stat(name, dir_fd=fd)
                    kind = _BY_FORMAT.get(status.st_mode & _FORMAT, _OTHER)
                    links[int(name)] = link
                    tally.note(kind, status, int(name))
            except FileNotFoundError:
                # It has been closed since the folder was read.
                continue
            tally.counts[kind] += 1
    finally:
        folder.close()
    tally.counts[DescriptorKind.SOCKET] = len(sockets)
    return sockets, tally.result(links.__getitem__)


class _Tally:
    """Descriptors by kind, and by file where there is one."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys((kind.value for kind in DescriptorKind), 0)
        self._files: Counter[_File] = Counter()
        self._examples: dict[_File, int] = {}

    def add(self, fd: int, status: os.stat_result, *, named: bool) -> None:
        """Count what is open at a number of this process."""
        kind = _BY_FORMAT.get(status.st_mode & _FORMAT)
        # What is in memory only is a file without a name.
        if kind is None or (kind is _FILE and not status.st_nlink):
            kind = _kind_of_link(_link_of(fd), kind or _OTHER)
        self.counts[kind] += 1
        if named and kind in _NAMED:
            self.note(kind, status, fd)

    def note(self, kind: DescriptorKind, status: os.stat_result, fd: int) -> None:
        """Count the file that is open at a number."""
        # What has no file shares its inode with others.
        file = kind, status.st_dev, fd if kind is _OTHER else status.st_ino
        self._files[file] += 1
        self._examples[file] = fd

    def result(self, link_of: Callable[[int], str]) -> Descriptors:
        """All that has been counted, with the links of what is open most often."""
        links: dict[str, list[tuple[str, int]]] = {}
        for file, times in islice(self._files.most_common(), _MAX_LINKS):
            links.setdefault(file[0].value, []).append((link_of(self._examples[file]), times))
        counts = Counter({kind: times for kind, times in self.counts.items() if times})
        names = {kind: most_frequent(found) for kind, found in links.items()}
        return Descriptors(counts.total(), dict(counts.most_common()), names)


_File = tuple[DescriptorKind, int, int]


class DescriptorsOfBlock:
    """Those that a block has opened, from the moment that this is made.

    Raises:
        ConfigurationError: Descriptors cannot be listed here.
    """

    def __init__(self) -> None:
        self._before = {fd: _identity(status) for fd, status in _listed()}
        self._candidates: dict[int, Identity] | None = None
        self._left = set[int]()

    def still_open(self, judged: Container[int], *, sockets: bool) -> Descriptors:
        """Those that were open when this was first asked, and have been each time since.

        Args:
            judged: The numbers of the sockets on which there is a finding.
            sockets: Whether other sockets count, which native code has opened.
        """
        tally, found, left = _Tally(), dict[int, Identity](), set[int]()
        for fd, status in _listed():
            identity = _identity(status)
            known = self._before if self._candidates is None else self._candidates
            is_same = known.get(fd) == identity
            # What is opened after the block is not the block's.
            if is_same == (self._candidates is None) or is_owned(fd, identity):
                continue
            found[fd] = identity
            is_accepted = not sockets and identity[2] == stat.S_IFSOCK
            if fd not in judged and not is_accepted and not _is_of_process(fd):
                tally.add(fd, status, named=True)
                left.add(fd)
        self._candidates, self._left = found, left
        return tally.result(_link_of)

    def with_owners(self, left: Descriptors, registry: Registry, mark: int) -> Descriptors:
        """What was still open the last time, with all that the block has made and that has them.

        Args:
            left: What was still open.
            registry: Knows what has most of them.
            mark: What the block has made comes after it.
        """
        return replace(left, owners=_owners_by_kind(registry, mark, self._left))


def _listed() -> Iterator[tuple[int, os.stat_result]]:
    try:
        yield from open_descriptors()
    except Exception as error:
        refusals.note(error)
        raise ConfigurationError(
            f"no_leaks(descriptors=True): the open descriptors cannot be listed here ({error})"
        ) from error


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_mode & _FORMAT


# Opened once in a process, by whatever needs it first, and kept to its end.
_KEPT_LINKS = frozenset({"/dev/random", "/dev/urandom"})
_KEPT_BY = (
    ("multiprocessing.resource_tracker", "_resource_tracker", "_fd"),
    ("multiprocessing.forkserver", "_forkserver", "_forkserver_alive_fd"),
)


def _is_of_process(fd: int) -> bool:
    """Whether Python itself keeps it for the whole process."""
    for home, name, field in _KEPT_BY:
        if getattr(getattr(sys.modules.get(home), name, None), field, None) == fd:
            return True
    return _link_of(fd) in _KEPT_LINKS


def open_descriptors() -> Iterator[tuple[int, os.stat_result]]:
    """Each number at which something is open, with what it is.

    Raises:
        Exception: They cannot be listed here.
    """
    numbers, left = numbers_to_try()
    fstat = os.fstat
    for fd in numbers:
        try:
            status = fstat(fd)
        except OSError:
            # The listing's own, one that has been closed since, or a number that is free.
            continue
        yield fd, status
        left -= 1
        if not left:
            break


_FILE, _OTHER, _FORMAT = DescriptorKind.FILE, DescriptorKind.OTHER, 0o170000
_BY_FORMAT = {
    stat.S_IFSOCK: DescriptorKind.SOCKET,
    stat.S_IFIFO: DescriptorKind.PIPE,
    stat.S_IFREG: _FILE,
    stat.S_IFDIR: DescriptorKind.DIRECTORY,
    stat.S_IFCHR: DescriptorKind.DEVICE,
    stat.S_IFBLK: DescriptorKind.DEVICE,
}
# By what the kernel calls that which has no file, in `/proc/PID/fd`.
_BY_LINK = {
    "socket": DescriptorKind.SOCKET,
    "pipe": DescriptorKind.PIPE,
    "eventpoll": DescriptorKind.EPOLL,
    "eventfd": DescriptorKind.EVENTFD,
    "timerfd": DescriptorKind.TIMERFD,
    "signalfd": DescriptorKind.SIGNALFD,
    "inotify": DescriptorKind.INOTIFY,
    "pidfd": DescriptorKind.PIDFD,
    "io_uring": DescriptorKind.IO_URING,
}
# The others have no name, or one each.
_NAMED = frozenset({_FILE, DescriptorKind.DIRECTORY, DescriptorKind.DEVICE, _OTHER})
_MEMFD, _DELETED = "/memfd:", " (deleted)"


def _kind_of_link(link: str, otherwise: DescriptorKind) -> DescriptorKind:
    """What `anon_inode:[eventpoll]`, `anon_inode:inotify`, `pipe:[123]`, `/memfd:name` are."""
    if link.startswith(_MEMFD) and link.endswith(_DELETED):
        return DescriptorKind.MEMFD
    first, _, second = link.partition(":")
    return _BY_LINK.get(second.strip("[]") if first == "anon_inode" else first, otherwise)


def _link_of(fd: int) -> str:
    if sys.platform != "linux":
        return ""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - it may be no path
    except OSError:
        return ""


# Reading a link takes some microseconds.
_MAX_LINKS = 2000
_MAX_NAMES = 3


def most_frequent(links: Iterable[tuple[str, int]]) -> Mapping[str, int]:
    """What is open most often: a path with its count, or a folder with how many of its files are.

    Example:
        >>> most_frequent([("/log", 3), ("/up/1", 1), ("/up/2", 1), ("/up/3", 2), ("/etc/x", 1)])
        {'/log': 3, '/up/3': 2, '/up/*': 2}
    """
    counts: Counter[str] = Counter()
    for link, times in links:
        counts[link] += times
    del counts[""]
    if len(counts) > _MAX_NAMES:
        single = [link for link, times in counts.items() if times == 1]
        folders = Counter(link.rpartition("/")[0] for link in single)
        for link in single:
            folder = link.rpartition("/")[0]
            if folders[folder] > 1:
                del counts[link]
                counts[f"{folder}/*"] += 1
    return dict(counts.most_common(_MAX_NAMES))
