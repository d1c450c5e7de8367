"""What was found of one test or fixture: a frozen value, and its plain form for the wire.

Leaks of many tests by the line where they were opened: pure.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from closewait_guard._format import pluralize
from closewait_guard.model import Finding, Frame

if TYPE_CHECKING:
    from closewait_guard.model import Report

__all__ = [
    "SCHEMA",
    "Outcome",
    "OwnerFinding",
    "Site",
    "location",
    "relative",
    "sites",
]


SCHEMA = "closewait-guard-pytest/1"


class Outcome(StrEnum):
    """What became of a finding."""

    FAILED = "failed"
    WARNED = "warned"
    ALLOWED = "allowed"
    UNUSED_WAIVER = "unused_waiver"
    SETTLED = "settled"


class OwnerFinding(NamedTuple):
    """The leaks of one owner, or that a waiver is not needed any more.

    Attributes:
        owner: The test's id, or the fixture's name and place.
        nodeid: The test, or the module or class of the fixture; empty for the whole session.
        kind: `test` or `fixture`.
        waited: Seconds that the sockets were given to settle.
        reason: Why it is allowed to leak.
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
    def fails(self) -> bool:
        """Whether somebody fails for it."""
        return self.outcome is Outcome.FAILED

    def plain(self) -> dict[str, Any]:
        """Ready for JSON and for the wire."""
        from closewait_guard._render import to_dict

        return {
            "schema": SCHEMA,
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
    def of(cls, data: Mapping[str, Any]) -> OwnerFinding:
        """What `plain` was made of."""
        from closewait_guard._render import from_dict

        values = {name: value for name, value in data.items() if name != "schema"}
        values["outcome"] = Outcome(values["outcome"])
        if values["report"] is not None:
            values["report"] = from_dict(values["report"])
        return cls(**values)


class Site(NamedTuple):
    """One line of code, and who leaked the sockets opened there."""

    frame: Frame | None
    outcome: Outcome
    findings: tuple[Finding, ...]
    owners: tuple[OwnerFinding, ...]

    def who(self) -> str:
        """The only owner, or how many tests and fixtures."""
        if len(self.owners) == 1:
            return self.owners[0].owner
        kinds = [owner.kind for owner in self.owners]
        return " and ".join(
            pluralize(kinds.count(kind), kind) for kind in ("test", "fixture") if kind in kinds
        )


def sites(findings: Iterable[OwnerFinding]) -> list[Site]:
    """Group by birth site and by what became of it; those with the most owners first."""
    groups: dict[tuple[Frame | None, Outcome], list[tuple[Finding, OwnerFinding]]] = {}
    for finding in findings:
        for leak in finding.report.findings if finding.report is not None else ():
            key = (leak.observation.record.site, finding.outcome)
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


def location(frame: Frame | None, root: Path) -> str:
    """File and line, as pytest writes them: from its root folder on."""
    if frame is None:
        return "an unknown place"
    return f"{relative(frame.filename, root)}:{frame.lineno}"


def relative(filename: str, folder: str | Path) -> str:
    """From a folder on; the whole path of what lies elsewhere."""
    try:
        path = os.path.relpath(filename, folder)
    except ValueError:
        # Without a name, or on another drive.
        return filename
    return filename if path.startswith("..") else path
