"""What the check of a test or a fixture has found, as a value and a dict; groups by line."""

from __future__ import annotations

import linecache
import os
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from closewait_guard._format import pluralize
from closewait_guard.model import TEST_SCHEMA, Finding, Frame, FrameKind, SocketRecord

if TYPE_CHECKING:
    from closewait_guard.model import Report

__all__ = [
    "Ends",
    "Outcome",
    "OwnerFinding",
    "Site",
    "ends_of",
    "find_declaration",
    "format_location",
    "group_by_site",
    "in_default_pool",
    "own_frame",
    "reason_of",
    "relative_path",
]


class Outcome(StrEnum):
    """What became of a finding."""

    FAILED = "failed"
    WARNED = "warned"
    STILL_RUNNING = "still_running"
    LIBRARY_DEFAULT = "library_default"
    ALLOWED = "allowed"
    UNUSED_WAIVER = "unused_waiver"
    SETTLED = "settled"


class OwnerFinding(NamedTuple):
    """What the check of one owner has found: its leaks, or that a marker is not needed any more.

    Attributes:
        owner: The test's id, or the fixture's name and place.
        nodeid: The test, or the module or class of the fixture; empty for the whole session.
        kind: `test` or `fixture`.
        waited: Seconds that the sockets were given to settle.
        reason: Why it is allowed to leak, or what holds it: of a library's own pool, the variable.
        report: Has the leaks of this owner only.
        worker: The pytest-xdist worker that found it.
    """

    owner: str
    nodeid: str
    kind: str
    outcome: Outcome
    waited: float = 0.0
    reason: str | None = None
    report: Report | None = None
    worker: str | None = None

    @property
    def is_failure(self) -> bool:
        """Whether a test or a fixture fails for it."""
        return self.outcome is Outcome.FAILED

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and for pytest-xdist."""
        from closewait_guard._render import to_dict

        return {
            "schema": TEST_SCHEMA,
            "owner": self.owner,
            "nodeid": self.nodeid,
            "kind": self.kind,
            "outcome": self.outcome.value,
            "waited": round(self.waited, 3),
            "reason": self.reason,
            "worker": self.worker,
            "report": to_dict(self.report) if self.report is not None else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OwnerFinding:
        """The inverse of `to_dict`."""
        from closewait_guard._render import from_dict

        values = {name: value for name, value in data.items() if name != "schema"}
        values["outcome"] = Outcome(values["outcome"])
        if values["report"] is not None:
            values["report"] = from_dict(values["report"])
        return cls(**values)


class Site(NamedTuple):
    """One line of code, and the tests and fixtures that leaked the sockets opened there."""

    frame: Frame | None
    outcome: Outcome
    leaks: tuple[Finding, ...]
    owners: tuple[OwnerFinding, ...]

    def describe_owners(self) -> str:
        """The only owner, or how many tests and fixtures."""
        if len(self.owners) == 1:
            return self.owners[0].owner
        kinds = [owner.kind for owner in self.owners]
        return " and ".join(
            pluralize(kinds.count(kind), kind) for kind in ("test", "fixture") if kind in kinds
        )


def own_frame(record: SocketRecord, folder: str | Path) -> Frame | None:
    """The innermost call of the reader's own code: below the folder, and of no library."""
    for frame in record.blamed.stack:
        is_below = relative_path(frame.filename, folder) != frame.filename
        if frame.kind is FrameKind.USER and is_below:
            return frame
    return None


def find_declaration(finding: OwnerFinding, root: Path) -> tuple[str, int] | None:
    """The file of a test or fixture and its line in it; the file's first if that is not found."""
    path, *names = finding.nodeid.split("::")
    if finding.kind == "fixture":
        names += re.findall(r"fixture '(\w+)'", finding.owner)
    lines = linecache.getlines(str(root / path)) if path else []
    number = 0
    for name in names:
        words = re.compile(rf"\s*(?:class|(?:async )?def) {re.escape(name.partition('[')[0])}\b")
        after = (place for place in range(number, len(lines)) if words.match(lines[place]))
        number = next(after, number - 1) + 1
    return (str(root / path), max(number, 1)) if lines else None


def group_by_site(findings: Iterable[OwnerFinding], root: Path) -> list[Site]:
    """Group leaks by line and outcome; those with the most owners first."""
    groups: dict[tuple[Frame | None, Outcome], list[tuple[Finding, OwnerFinding]]] = {}
    for finding in findings:
        for leak in finding.report.findings if finding.report is not None else ():
            record = leak.observation.record
            key = (own_frame(record, root) or record.site, finding.outcome)
            groups.setdefault(key, []).append((leak, finding))
    found = [
        Site(
            frame,
            outcome,
            tuple(leak for leak, _ in group),
            tuple({id(owner): owner for _, owner in group}.values()),
        )
        for (frame, outcome), group in groups.items()
    ]
    order = list(Outcome)
    return sorted(found, key=lambda site: (order.index(site.outcome), -len(site.owners)))


Ends = tuple[str, str]


def ends_of(finding: Finding) -> Ends:
    """The two addresses of a connection, the own one first; of IPv4 the same within IPv6."""
    observation = finding.observation
    local, peer = observation.local or "", observation.peer or ""
    return _plain_address(local), _plain_address(peer)


def _plain_address(address: str) -> str:
    return address.replace("[::ffff:", "").replace("]", "")


def reason_of(leaks: Iterable[Finding], reasons: dict[int, str]) -> str | None:
    """What holds some of them, each once."""
    found = (reasons.get(each.observation.record.serial) for each in leaks)
    return "; ".join(dict.fromkeys(filter(None, found))) or None


def in_default_pool(variable: str) -> str:
    """The sentence for what the global variable of a library keeps."""
    return f"a library's own pool keeps it, {variable}"


def format_location(frame: Frame | None, root: Path) -> str:
    """File and line, as pytest writes them: from its root folder on."""
    if frame is None:
        return "an unknown place"
    return f"{relative_path(frame.filename, root)}:{frame.lineno}"


def relative_path(filename: str, folder: str | Path) -> str:
    """From a folder on; the whole path of what lies elsewhere."""
    try:
        path = os.path.relpath(filename, folder)
    except ValueError:
        # Without a name, or on another drive.
        return filename
    return filename if path.startswith("..") else path
