"""Apply the program's own redaction to everything that a report would tell: pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from closewait_guard.model import Frame, Leak, Observation, Report, Scalar, SocketRecord
from closewait_guard.settings import Redactor

__all__ = ["redacted"]

_WITHHELD = "[withheld: the redact callable failed]"


def redacted(report: Report, redactor: Redactor) -> Report:
    """The report with addresses, labels, context, sources and holders as the redactor wants them.

    Where the redactor raises, or returns no text, nothing of the original is told.
    """
    mask = _Mask(redactor)
    return replace(
        report,
        leaks=tuple(mask.leak(leak) for leak in report.leaks),
        closed=tuple(replace(each, leak=mask.leak(each.leak)) for each in report.closed),
        observations=tuple(mask.observation(seen) for seen in report.observations),
    )


class _Mask:
    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor

    def leak(self, leak: Leak) -> Leak:
        holders = tuple(self._text(holder) for holder in leak.holders)
        return replace(leak, observation=self.observation(leak.observation), holders=holders)

    def observation(self, seen: Observation) -> Observation:
        return replace(
            seen,
            record=self._record(seen.record),
            local=self._optional(seen.local),
            peer=self._optional(seen.peer),
        )

    def _record(self, record: SocketRecord) -> SocketRecord:
        return replace(
            record,
            labels=tuple(self._text(label) for label in record.labels),
            context=self._context(record.context),
            parent=self._record(record.parent) if record.parent is not None else None,
            stack=tuple(self._frame(frame) for frame in record.stack),
        )

    def _context(self, context: Mapping[str, Scalar]) -> dict[str, Scalar]:
        return {
            name: self._text(value) if isinstance(value, str) else value
            for name, value in context.items()
        }

    def _frame(self, frame: Frame) -> Frame:
        return replace(frame, source=self._optional(frame.source))

    def _optional(self, text: str | None) -> str | None:
        return None if text is None else self._text(text)

    def _text(self, text: str) -> str:
        try:
            answer = self._redactor(text)
        except Exception:
            return _WITHHELD
        return answer if isinstance(answer, str) else _WITHHELD
