"""Apply the program's own redaction to everything that a report would tell: pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from closewait_guard.model import Alert, Frame, Leak, Observation, Report, Scalar, SocketRecord

__all__ = ["Mask", "redacted", "text_mask"]

WITHHELD = "[withheld: the redact callable failed]"


def redacted(report: Report, redactor: Callable[[str], str]) -> Report:
    """The report with every text that the program or its peers have chosen, as may be told of it.

    What names code stays: files, lines, functions, modules. Where the redactor raises, or returns
    no text, nothing of the original is told, and the report says how often.
    """
    mask = Mask(redactor)
    masked = replace(
        report,
        host=mask.text(report.host),
        command=mask.text(report.command),
        leaks=tuple(mask.leak(leak) for leak in report.leaks),
        alerts=tuple(mask.alert(alert) for alert in report.alerts),
        closed=tuple(replace(each, leak=mask.leak(each.leak)) for each in report.closed),
        observations=tuple(mask.observation(seen) for seen in report.observations),
    )
    notes = tuple(mask.text(note) for note in report.coverage.notes)
    if mask.failures:
        notes += (f"{mask.failures:,} texts that the redact callable failed on",)
    return replace(masked, coverage=replace(report.coverage, notes=notes))


def text_mask(redactor: Callable[[str], str] | None) -> Callable[[str], str]:
    """What may be told of a single text; all of it where nobody wants it otherwise."""
    return str if redactor is None else Mask(redactor).text


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

    def observation(self, seen: Observation) -> Observation:
        """What may be told of a socket."""
        return replace(
            seen,
            record=self._record(seen.record),
            local=self._optional(seen.local),
            peer=self._optional(seen.peer),
        )

    def leak(self, leak: Leak) -> Leak:
        """What may be told of a leak."""
        holders = tuple(self.text(holder) for holder in leak.holders)
        return replace(leak, observation=self.observation(leak.observation), holders=holders)

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
        return {self.text(name): self._scalar(value) for name, value in context.items()}

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
