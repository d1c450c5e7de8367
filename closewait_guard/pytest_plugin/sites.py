"""Leaks of many tests by the line where they were born: pure."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from closewait_guard._words import count_of
from closewait_guard.model import Frame, Leak
from closewait_guard.pytest_plugin.finding import Finding, Outcome

__all__ = ["Site", "place", "relative", "sites"]


class Site(NamedTuple):
    """One line of code, and who leaked the sockets born there."""

    frame: Frame | None
    outcome: Outcome
    leaks: tuple[Leak, ...]
    owners: tuple[Finding, ...]

    def who(self) -> str:
        """The only owner, or how many tests and fixtures."""
        if len(self.owners) == 1:
            return self.owners[0].owner
        kinds = [owner.kind for owner in self.owners]
        return " and ".join(
            count_of(kinds.count(kind), kind) for kind in ("test", "fixture") if kind in kinds
        )


def sites(findings: Iterable[Finding]) -> list[Site]:
    """Group by birth site and by what became of it; those with the most owners first."""
    groups: dict[tuple[Frame | None, Outcome], list[tuple[Leak, Finding]]] = {}
    for finding in findings:
        for leak in finding.report.leaks if finding.report is not None else ():
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


def place(frame: Frame | None, root: Path) -> str:
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
