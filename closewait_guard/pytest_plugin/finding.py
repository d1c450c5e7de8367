"""What was found of one test or fixture: a frozen value, and its plain form for the wire."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from closewait_guard.model import Report

__all__ = ["SCHEMA", "Finding", "Outcome"]

SCHEMA = "closewait-guard-pytest/1"


class Outcome(StrEnum):
    """What became of a finding."""

    FAILED = "failed"
    WARNED = "warned"
    ALLOWED = "allowed"
    UNUSED_WAIVER = "unused_waiver"
    SETTLED = "settled"


class Finding(NamedTuple):
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
        from closewait_guard._serial import to_dict

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
    def of(cls, data: Mapping[str, Any]) -> Finding:
        """What `plain` was made of."""
        from closewait_guard._serial import from_dict

        values = {name: value for name, value in data.items() if name != "schema"}
        values["outcome"] = Outcome(values["outcome"])
        if values["report"] is not None:
            values["report"] = from_dict(values["report"])
        return cls(**values)
