"""From a creation to the public record of it: resolve stacks to frames, count by site."""

from __future__ import annotations

import _socket
import linecache
import os
import sys
import tokenize  # noqa: F401 - Python 3.15 imports it with the first source that is read
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, TypeVar

from closewait_guard._capture import (
    SERIAL,
    SOCK,
    STACK,
    CapturedStack,
    Creation,
    CreationTuple,
    SharedStack,
    intern,
    kind_of_file,
    normal_path,
)
from closewait_guard._clock import TimeLimit
from closewait_guard._cpython import LOOP_CLOSED, LOOP_THREAD
from closewait_guard._descriptors import inode_of
from closewait_guard._enums import FrameKind, Origin
from closewait_guard._inspect.observation import SiteCount
from closewait_guard._live import exact_text, field, module_dict, module_of_file
from closewait_guard.model import (
    Finding,
    Frame,
    OpenAtEnd,
    Report,
    Severity,
    SocketRecord,
    Verdict,
)

if TYPE_CHECKING:
    from closewait_guard._capture import OpenOwner, OwnerTable, Registry
    from closewait_guard._libraries import OwnerKind

__all__ = [
    "Makers",
    "add_open_at_end",
    "count_as_own",
    "count_by_site",
    "group_by_line",
    "is_ours",
    "kind_of",
    "record_of",
    "resolve",
    "retry_sources",
]


_fileno = _socket.socket.fileno
_T = TypeVar("_T")

# Those with a source file that could not be read.
_without_source: list[SharedStack] = []


def resolve(stack: CapturedStack) -> tuple[Frame, ...]:
    """Turn a stack into frames with line numbers and source lines; the guard's own are left out."""
    intern(stack)
    if not stack:
        return ()
    known: SharedStack = stack[0]
    frames = known.frames
    if frames is None:
        calls = zip(known.codes, known.offsets, strict=True)
        frames = known.frames = tuple(
            _frame(code, offset) for code, offset in calls if not is_ours(code.co_filename)
        )
        if any(map(_lacks_source, frames)):
            _without_source.append(known)
    return frames


def retry_sources() -> None:
    """Try again what could not be read: a descriptor may be left for it now."""
    with suppress(IndexError):
        while True:
            _without_source.pop().frames = None


def _lacks_source(frame: Frame) -> bool:
    has_file = not frame.filename.startswith("<")
    return frame.source is None and has_file and frame.filename not in linecache.cache


def _frame(code: CodeType, offset: int) -> Frame:
    is_awaiting = offset < 0
    lineno = _line_at(code, ~offset if is_awaiting else offset)
    return Frame(
        filename=code.co_filename,
        lineno=lineno,
        function=code.co_qualname,
        module=_module_of(code.co_filename),
        kind=kind_of(code.co_filename),
        source=linecache.getline(code.co_filename, lineno).strip() or None,
        is_awaiting=is_awaiting,
    )


def _line_at(code: CodeType, offset: int) -> int:
    for start, end, line in code.co_lines():
        if start <= offset < end and line is not None:
            return line
    return code.co_firstlineno


def kind_of(filename: str) -> FrameKind:
    """Whose code a file is. What only starts an installed program belongs to a library."""
    if filename in _own_files:
        return FrameKind.USER
    kind = kind_of_file(filename)
    return FrameKind.LIBRARY if kind is FrameKind.USER and _is_launcher(filename) else kind


def _is_launcher(filename: str) -> bool:
    if filename == "<string>":
        # Made at runtime, as by dataclasses, or what starts a process; unless it is the program.
        return "__file__" in (module_dict(sys.modules.get("__main__")) or ())
    return _is_console_script(filename)


@lru_cache(4096)
def _is_console_script(filename: str) -> bool:
    """Whether an installer has made the file, to call a function of a package."""
    folder, _, name = normal_path(filename).rpartition("/")
    if name == "__main__.py":
        return folder.endswith(".exe")
    is_among_scripts = folder.rpartition("/")[2] in ("bin", "Scripts")
    if not is_among_scripts or os.path.splitext(name)[1] not in ("", ".py"):  # noqa: PTH122
        return False
    lines = linecache.getlines(filename)
    return len(lines) < 50 and any(line.strip().startswith("sys.exit(") for line in lines)


def count_as_own(filenames: Iterable[str]) -> None:
    """Have these files, and no others, be the program's own though they lie among libraries."""
    global _own_files
    _own_files = frozenset(filenames)


_own_files: frozenset[str] = frozenset()


def is_ours(filename: str) -> bool:
    return normal_path(filename).startswith(_ours(sys.modules.get("wrapt")))


@lru_cache(2)
def _ours(wrapt: ModuleType | None) -> tuple[str, ...]:
    folders = [normal_path(__file__).rpartition("/_inspect/")[0]]
    if wrapt is not None and wrapt.__file__:
        folders.append(normal_path(wrapt.__file__).rpartition("/")[0])
    return tuple(folder + "/" for folder in folders)


@lru_cache(4096)
def _module_of(filename: str) -> str:
    """The name under which a file was imported; its stem when no module owns to it."""
    return module_of_file(filename) or os.path.splitext(os.path.basename(filename))[0]  # noqa: PTH119, PTH122


def record_of(creation: CreationTuple, pid: int) -> SocketRecord:
    """The public record, with its stack resolved. Those of another process are inherited ones."""
    fields = Creation._make(creation)._asdict()
    del fields["sock"], fields["object_id"]
    fields["stack"] = resolve(fields["stack"])
    fields["labels"] = tuple(map(exact_text, fields["labels"]))
    if fields["parent"] is not None:
        fields["parent"] = record_of(fields["parent"], pid)
    record = SocketRecord(**fields)
    if record.pid == pid:
        return record
    return replace(record, pid=pid, origin=Origin.INHERITED, parent=record)


class Makers:
    """Finds the socket that another is a copy of, where that came as a number.

    All descriptors are asked for that, once in a scan, and only if there is such a copy.

    Args:
        open_sockets: The creations of what the latest scan has found open, the oldest first.
    """

    def __init__(self, open_sockets: Callable[[], Iterable[CreationTuple]]) -> None:
        self._open_sockets = open_sockets
        self._by_inode: dict[int, CreationTuple] | None = None

    def record_of(self, creation: CreationTuple, fd: int, pid: int) -> SocketRecord:
        """The record of a creation, with that of the socket it is a copy of as its parent."""
        record = record_of(creation, pid)
        is_taken_over = record.origin is Origin.ADOPTED and record.stack
        if not is_taken_over and (record.origin is not Origin.NATIVE or record.stack):
            return record
        if self._by_inode is None:
            self._by_inode = _find_makers(self._open_sockets())
        maker = self._by_inode.get(inode_of(fd) or 0)
        if maker is None or maker[SERIAL] >= creation[SERIAL]:
            return record
        origin = Origin.DUPLICATED if is_taken_over else Origin.NATIVE
        return replace(record, origin=origin, parent=record_of(maker, pid))


_MAX_MAKERS = 10_000


def _find_makers(creations: Iterable[CreationTuple]) -> dict[int, CreationTuple]:
    """By inode, the oldest of the sockets that were opened here; of very many, of the newest."""
    found: dict[int, CreationTuple] = {}
    for creation in islice(reversed(list(creations)), _MAX_MAKERS):
        sock = creation[SOCK]()
        if sock is not None and creation[STACK]:
            inode = inode_of(_fileno(sock))
            older = found.get(inode or 0)
            if inode and (older is None or older[SERIAL] > creation[SERIAL]):
                found[inode] = creation
    return found


def group_by_line(creations: Iterable[tuple[_T, CreationTuple]]) -> list[list[_T]]:
    """What was made by the same calls, together; what was made at an unknown place is left out.

    By lines, and not by offsets: a call that the interpreter has specialized has another than
    before.
    """
    by_stack: dict[int, tuple[CapturedStack, list[_T]]] = {}
    for made, creation in creations:
        stack = creation[STACK]
        intern(stack)
        if stack:
            by_stack.setdefault(id(stack[0]), (stack, []))[1].append(made)
    by_line: dict[tuple[Frame, ...], list[_T]] = {}
    for stack, group in by_stack.values():
        by_line.setdefault(resolve(stack), []).extend(group)
    return list(by_line.values())


def count_by_site(creations: Iterable[CreationTuple], mark: int, pid: int) -> dict[str, SiteCount]:
    """Count by site; sockets that were opened at an unknown place are left out."""
    counts: dict[int, list[int]] = {}
    examples: dict[int, CreationTuple] = {}
    for creation in creations:
        stack = creation[STACK]
        intern(stack)
        if stack:
            # Equal stacks are one object once they are interned.
            key = id(stack[0])
            count = counts.setdefault(key, [0, 0])
            count[0] += 1
            count[1] += creation[SERIAL] <= mark
            examples[key] = creation
    found: dict[str, SiteCount] = {}
    for key, (now, old) in counts.items():
        site = record_of(examples[key], pid).site
        if site is not None:
            before = found.get(site.call, SiteCount(0, 0))
            found[site.call] = SiteCount(before.open + now, before.old + old)
    return found


# The processor time for what is open at the end, and how many lines of it are listed.
_MAX_SECONDS, _MAX_LISTED = 0.2, 20
_NOT_KNOWN = "what only the end of the program closes"


def add_open_at_end(registry: Registry, report: Report) -> Report:
    """The last report of a process, with the owners that are open and that it does not name."""
    table = registry.owners
    if table is None:
        return report
    try:
        found, notes = _find_open_at_end(table, registry.pid, report.findings)
    except Exception as error:
        # It is the last report: all the rest is in it.
        found, notes = [], [f"{_NOT_KNOWN}: the search failed ({type(error).__name__})"]
    coverage = replace(report.coverage, notes=(*report.coverage.notes, *notes))
    return replace(report, open_at_end=tuple(found), coverage=coverage)


def _find_open_at_end(
    table: OwnerTable, pid: int, findings: Sequence[Finding]
) -> tuple[list[OpenAtEnd], list[str]]:
    """The most first; and what could not be found out."""
    named = [each.observation for each in findings if _is_shown(each)]
    serials = {seen.record.serial for seen in named}
    creations: dict[OwnerKind, list[CreationTuple]] = {}
    owners, notes = table.open_owners(), list[str]()
    limit = TimeLimit(_MAX_SECONDS)
    for owner, entry in owners:
        if limit.is_over():
            notes.append(f"some of {_NOT_KNOWN}: there are too many objects")
            break
        with suppress(Exception):
            if _is_left_to_end(table, owner, entry, serials):
                creations.setdefault(entry.kind, []).append(entry.creation)
    reported = {each.observation.record.serial for each in findings}
    for ended in table.ended.copy():
        # Not yet ended when the report looked: the collector has found it since.
        is_late = ended.serial not in reported and (ended.sockets or ended.descriptors)
        if ended.is_left_to_exit or is_late:
            creations.setdefault(ended.kind, []).append(ended.creation)
    sites = {(seen.owner.name, seen.record.site) for seen in named if seen.owner is not None}
    lines = {(name, site.call) for name, site in sites if site is not None}
    found = [
        OpenAtEnd(kind.name, count, place)
        for kind, those in creations.items()
        for place, count in _count_by_line(those, pid).items()
        if count and (kind.name, place) not in lines
    ]
    found.sort(key=lambda each: -each.count)
    if len(found) > _MAX_LISTED:
        rest = sum(each.count for each in found[_MAX_LISTED:])
        found[_MAX_LISTED:] = [OpenAtEnd("other object", rest, "")]
    return found, notes


def _is_shown(finding: Finding) -> bool:
    """Whether a report says more of it than a number."""
    is_news = finding.severity is not Severity.INFO or finding.verdict is Verdict.CHECKED_OUT
    return finding.is_leak or is_news


def _is_left_to_end(table: OwnerTable, owner: object, entry: OpenOwner, named: Set[int]) -> bool:
    """Whether it has any descriptor, is no loop that runs, and will not close itself."""
    is_loop = field(owner, LOOP_CLOSED) is False
    is_running = is_loop and field(owner, LOOP_THREAD) is not None
    if entry.kind.closes_itself or is_running or entry.creation[SERIAL] in named:
        return False
    sockets = [each.serial for each in table.sockets_of(owner, entry.kind)]
    if any(serial in named for serial in sockets):
        return False
    return bool(sockets) or any(entry.kind.descriptors(owner))


def _count_by_line(creations: list[CreationTuple], pid: int) -> dict[str, int]:
    """How many each line has made; under no name those of which that is unknown."""
    counts = {call: each.open for call, each in count_by_site(creations, 0, pid).items()}
    return counts | {"": len(creations) - sum(counts.values())}
