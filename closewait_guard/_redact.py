"""Applies the program's `redact` callable to every text of a report that code did not choose."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from closewait_guard._threads import CallThread
from closewait_guard.model import (
    Alert,
    Checkout,
    Descriptors,
    Finding,
    Frame,
    Observation,
    OpenAtEnd,
    Report,
    Scalar,
    SocketRecord,
)

__all__ = [
    "Mask",
    "Redaction",
]


_T = TypeVar("_T")

WITHHELD = "[withheld: the redact callable failed]"


class Redaction:
    """Calls a redact callable that may fail, block, or make a report itself; None redacts nothing.

    While a call has not returned in time, all texts are withheld at once.
    """

    def __init__(self, redactor: Callable[[str], str] | None, timeout: float = 10.0) -> None:
        self._redactor = redactor
        self._timeout = timeout
        self._thread, self._pid = CallThread(), os.getpid()

    def report(self, report: Report) -> Report:
        """Redact a report."""
        return self.apply(lambda mask: mask.report(report), report)

    def open_at_end(self, report: Report) -> Report:
        """Redact what was added to a report when that had been redacted."""
        found = report.open_at_end
        if not found:
            return report
        masked = self.apply(lambda mask: mask.open_at_end(found), found)
        return replace(report, open_at_end=masked)

    def text(self, text: str) -> str:
        """Redact a single text."""
        return self.apply(lambda mask: mask.text(text), text)

    def apply(self, change: Callable[[Mask], _T], original: _T) -> _T:
        """Redact a value with `change`, which passes its texts to a mask."""
        if self._redactor is None:
            return original
        if self._pid != os.getpid():
            # In a forked child: the thread is the parent's.
            self._thread, self._pid = CallThread(), os.getpid()
        mask, results = Mask(self._redactor), list[_T]()
        error = self._thread.call(lambda: results.append(change(mask)), self._timeout)
        return change(Mask(_withhold)) if error is not None else results[0]


def _withhold(_: str) -> str:
    raise TimeoutError


class Mask:
    """Redacts values; where the callable fails, the text is withheld.

    Attributes:
        failures: How often the callable has raised, or returned no text.
    """

    def __init__(self, redactor: Callable[[str], str]) -> None:
        self._redactor = redactor
        self.failures = 0

    def text(self, text: str) -> str:
        """Redact a text."""
        try:
            answer = self._redactor(text)
        except Exception:
            answer = None
        # A subclass of str could show something else later.
        if type(answer) is str:
            return answer
        self.failures += 1
        return WITHHELD

    def report(self, report: Report) -> Report:
        """Redact every text of a report that the program or its peers have chosen.

        Names of code stay: files, lines, functions, modules. Where the callable raises, or returns
        no text, the text is withheld, and the report says how often.
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
            descriptors=self.descriptors(report.descriptors),
            full_pools=tuple(
                replace(pool, name=self.text(pool.name)) for pool in report.full_pools
            ),
            open_at_end=self.open_at_end(report.open_at_end),
            redacted=True,
        )
        notes, unknown = (
            tuple(self.text(note) for note in those)
            for those in (report.coverage.notes, report.coverage.leaks_unknown)
        )
        failed = self.failures - before
        if failed:
            notes += (f"{failed:,} texts that the redact callable failed on",)
        coverage = replace(report.coverage, notes=notes, leaks_unknown=unknown)
        return replace(masked, coverage=coverage)

    def counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Redact the names by which something was counted."""
        masked: dict[str, int] = {}
        for name, number in counts.items():
            shown = self.text(name)
            masked[shown] = masked.get(shown, 0) + number
        return masked

    def descriptors(self, found: Descriptors | None) -> Descriptors | None:
        """Redact the names of what is open."""
        if found is None:
            return None
        names, owners = (
            {kind: self.counts(counts) for kind, counts in by_kind.items()}
            for by_kind in (found.names, found.owners)
        )
        return replace(found, names=names, owners=owners)

    def open_at_end(self, found: tuple[OpenAtEnd, ...]) -> tuple[OpenAtEnd, ...]:
        """Redact where what is open at the end was made."""
        return tuple(replace(each, place=each.place and self.text(each.place)) for each in found)

    def observation(self, seen: Observation) -> Observation:
        """Redact an observation."""
        return replace(
            seen,
            record=self._record(seen.record),
            local=self._optional(seen.local),
            peer=self._optional(seen.peer),
            checkout=self._checkout(seen.checkout),
        )

    def _checkout(self, checkout: Checkout | None) -> Checkout | None:
        return None if checkout is None else replace(checkout, pool=self.text(checkout.pool))

    def finding(self, finding: Finding) -> Finding:
        """Redact a finding."""
        holders = tuple(self.text(holder) for holder in finding.holders)
        return replace(finding, observation=self.observation(finding.observation), holders=holders)

    def alert(self, alert: Alert) -> Alert:
        """Redact an alert; its numbers are the guard's."""
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
        """Number names that are equal once they are redacted, so that no value is lost."""
        masked: dict[str, Scalar] = {}
        for name, value in context.items():
            unique = shown = self.text(name)
            while unique in masked:
                unique = f"{shown} ({len(masked) + 1})"
            masked[unique] = self._scalar(value)
        return masked

    def _scalar(self, value: Scalar) -> Scalar:
        """Redact a number too: it may be a secret. One that is left unchanged stays a number."""
        if value is None or isinstance(value, bool):
            return value
        answer = self.text(str(value))
        return value if answer == str(value) else answer

    def _frame(self, frame: Frame) -> Frame:
        return replace(frame, source=self._optional(frame.source))

    def _optional(self, text: str | None) -> str | None:
        return None if text is None else self.text(text)
