"""Apply the program's own redaction to everything that a report would tell."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from closewait_guard._threads import Turn
from closewait_guard.model import Alert, Finding, Frame, Observation, Report, Scalar, SocketRecord

__all__ = [
    "Mask",
    "Redaction",
]


_T = TypeVar("_T")

WITHHELD = "[withheld: the redact callable failed]"


class Redaction:
    """A redact callable that may fail, block, or ask for a report itself; None redacts nothing.

    Where it has not come back in time, all is withheld at once until it does.
    """

    def __init__(self, redactor: Callable[[str], str] | None, timeout: float = 10.0) -> None:
        self._redactor = redactor
        self._timeout = timeout
        self._turn, self._pid = Turn(), os.getpid()

    def report(self, report: Report) -> Report:
        """What may be told of a report."""
        return self.apply(lambda mask: mask.report(report), report)

    def text(self, text: str) -> str:
        """What may be told of a single text."""
        return self.apply(lambda mask: mask.text(text), text)

    def apply(self, change: Callable[[Mask], _T], original: _T) -> _T:
        """What is left of a value, which `change` passes through a mask."""
        if self._redactor is None:
            return original
        if self._pid != os.getpid():
            # The thread that had its turn is the parent's.
            self._turn, self._pid = Turn(), os.getpid()
        mask, found = Mask(self._redactor), list[_T]()
        error = self._turn.call(lambda: found.append(change(mask)), self._timeout)
        return change(Mask(_withhold)) if error is not None else found[0]


def _withhold(_: str) -> str:
    raise TimeoutError


class Mask:
    """A redactor that cannot fail.

    Attributes:
        failures: How often the callable has raised, or returned no text.
    """

    def __init__(self, redactor: Callable[[str], str]) -> None:
        self._redactor = redactor
        self.failures = 0

    def text(self, text: str) -> str:
        """What may be told of a text."""
        try:
            answer = self._redactor(text)
        except Exception:
            answer = None
        # A subclass could answer later what it likes.
        if type(answer) is str:
            return answer
        self.failures += 1
        return WITHHELD

    def report(self, report: Report) -> Report:
        """What may be told of a report, of every text that the program or its peers have chosen.

        What names code stays: files, lines, functions, modules. Where the redactor raises, or
        returns no text, nothing of the original is told, and the report says how often.
        """
        before = self.failures
        masked = replace(
            report,
            host=self.text(report.host),
            command=self.text(report.command),
            findings=tuple(self.finding(each) for each in report.findings),
            alerts=tuple(self.alert(alert) for alert in report.alerts),
            closed_late=tuple(
                replace(each, finding=self.finding(each.finding)) for each in report.closed_late
            ),
            observations=tuple(self.observation(seen) for seen in report.observations),
        )
        notes = tuple(self.text(note) for note in report.coverage.notes)
        failed = self.failures - before
        if failed:
            notes += (f"{failed:,} texts that the redact callable failed on",)
        return replace(masked, coverage=replace(report.coverage, notes=notes))

    def counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """What may be told of what was counted by name."""
        masked: dict[str, int] = {}
        for name, number in counts.items():
            shown = self.text(name)
            masked[shown] = masked.get(shown, 0) + number
        return masked

    def observation(self, seen: Observation) -> Observation:
        """What may be told of a socket."""
        return replace(
            seen,
            record=self._record(seen.record),
            local=self._optional(seen.local),
            peer=self._optional(seen.peer),
        )

    def finding(self, finding: Finding) -> Finding:
        """What may be reported of a finding."""
        holders = tuple(self.text(holder) for holder in finding.holders)
        return replace(finding, observation=self.observation(finding.observation), holders=holders)

    def alert(self, alert: Alert) -> Alert:
        """What may be told of an alert: its numbers are ours."""
        data = {
            name: self.text(value) if isinstance(value, str) else value
            for name, value in alert.data.items()
        }
        return replace(alert, message=self.text(alert.message), data=data)

    def _record(self, record: SocketRecord) -> SocketRecord:
        return replace(
            record,
            thread=self.text(record.thread),
            task=self._optional(record.task),
            labels=tuple(self.text(label) for label in record.labels),
            context=self._context(record.context),
            parent=self._record(record.parent) if record.parent is not None else None,
            stack=tuple(self._frame(frame) for frame in record.stack),
        )

    def _context(self, context: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Names that read alike once they are redacted are numbered, so that no value is lost."""
        masked: dict[str, Scalar] = {}
        for name, value in context.items():
            unique = shown = self.text(name)
            while unique in masked:
                unique = f"{shown} ({len(masked) + 1})"
            masked[unique] = self._scalar(value)
        return masked

    def _scalar(self, value: Scalar) -> Scalar:
        """A number may be a secret as well; one that is left as it is stays a number."""
        if value is None or isinstance(value, bool):
            return value
        answer = self.text(str(value))
        return value if answer == str(value) else answer

    def _frame(self, frame: Frame) -> Frame:
        return replace(frame, source=self._optional(frame.source))

    def _optional(self, text: str | None) -> str | None:
        return None if text is None else self.text(text)
