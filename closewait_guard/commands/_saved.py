"""The reports of a saved file: one JSON document, or JSON lines.

Of lines only what is asked for is read. Those of the pytest plugin have a report each, of one test
or fixture.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from closewait_guard._format import escape_line
from closewait_guard._render import from_dict, sum_reports
from closewait_guard._stream import print_error
from closewait_guard.commands._parser import Selection
from closewait_guard.exceptions import ReportFormatError
from closewait_guard.model import TEST_SCHEMA, Finding, Report

__all__ = [
    "Saved",
    "SavedOwner",
    "SavedReport",
]


_MAX_BYTES = 1 << 29
# The schema is the first value of a line.
_MAX_PREFIX = 100


class SavedOwner(NamedTuple):
    """The test or fixture that a report is of, as the pytest plugin has saved it.

    Attributes:
        outcome: What became of its leaks.
        waited: Seconds that its sockets were given to close.
        reason: Why they are excused, or what holds them.
        defined_at: Of a fixture, where it is defined.
    """

    name: str
    kind: str
    outcome: str
    waited: float
    reason: str | None
    defined_at: str | None

    @property
    def outcome_in_words(self) -> str:
        return escape_line(self.outcome.replace("_", " "))

    @property
    def title(self) -> str:
        """Its name, and the outcome."""
        return f"{escape_line(self.name)} ({self.outcome_in_words})"


class SavedReport(NamedTuple):
    """One report of a file.

    Attributes:
        number: Its place there, from 1.
        leaks: Those of its findings that are leaks: of a test all, unless it was allowed to leak.
        owner: The test or fixture that it is of, if it is of one.
        processes: Of how many it is the sum.
    """

    number: int
    report: Report
    leaks: tuple[Finding, ...]
    owner: SavedOwner | None = None
    processes: int = 1


class Saved:
    """The reports of one file; a line that is none is complained of and left out.

    Args:
        path: The file; `-` is stdin.

    Attributes:
        is_incomplete: Whether a line that was asked for is not a report.
        has_unknown: Whether one says that leaks of a test are unknown.

    Raises:
        ReportFormatError: The file cannot be read, or holds no report.
    """

    def __init__(self, path: str) -> None:
        self.name = "stdin" if path == "-" else path
        self.is_incomplete = self.has_unknown = False
        try:
            self._documents = list(_split(self._read(path)))
        except ReportFormatError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ReportFormatError(f"{self.name} cannot be read: {reason}") from error
        except MemoryError:
            raise ReportFormatError(f"{self.name} is too large for the memory") from None
        if not self._documents:
            raise ReportFormatError(
                f"{self.name} is empty: no report was saved, as in a test run without leaks"
            )

    def _read(self, path: str) -> bytes:
        if path == "-" and sys.stdin is None:
            raise ReportFormatError("stdin is closed")
        with nullcontext(sys.stdin.buffer) if path == "-" else Path(path).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            # A device, for instance, never ends.
            raise ReportFormatError(f"{self.name} is larger than {_MAX_BYTES:,} bytes")
        return data

    def __len__(self) -> int:
        return len(self._documents)

    @property
    def is_of_tests(self) -> bool:
        """Whether the pytest plugin has written it."""
        _, text = self._documents[0]
        return TEST_SCHEMA.encode() in text[:_MAX_PREFIX]

    def at(
        self,
        places: Iterable[int],
        most: int | None = None,
        is_wanted: Callable[[Any], bool] = lambda _: True,
    ) -> list[SavedReport]:
        """The reports at some places, of those that are wanted; no more than `most`.

        Raises:
            ReportFormatError: There is none at any of the places.
        """
        found: list[SavedReport] = []
        failures: list[ReportFormatError] = []
        for place in places:
            if len(found) == most:
                break
            try:
                found += self._parse(place, is_wanted)
            except ReportFormatError as error:
                failures.append(error)
        if not found:
            raise failures[0]
        for failure in failures:
            self.is_incomplete = True
            print_error(str(failure))
        self.has_unknown |= any(each.owner and each.owner.outcome == "unknown" for each in found)
        return found

    def latest(self, many: int) -> list[SavedReport]:
        """The last that can be read: who writes at this moment has not ended the last line."""
        return self.at(reversed(range(len(self))), many)[::-1]

    def latest_of_each_process(self) -> list[SavedReport]:
        """Of each process the last report that can be read, the latest first."""
        known = set[object]()

        def is_last(data: Any) -> bool:
            process = _process_of(data)
            is_new = process is None or process not in known
            known.add(process)
            return is_new

        return self.at(reversed(range(len(self))), is_wanted=is_last)

    def one(self, typed: int) -> SavedReport:
        """The report of a number as it is typed."""
        [saved] = self.at(Selection(str(typed)).of(len(self), self.name))
        return saved

    def whole(self) -> SavedReport:
        """The last report of each process as one; of tests, the findings of all."""
        if not self.is_of_tests:
            each = self.latest_of_each_process()
            report = sum_reports([saved.report for saved in each]) if each[1:] else each[0].report
            return SavedReport(each[0].number, report, report.leaks, processes=len(each))
        every = self.at(range(len(self)))
        findings = tuple(finding for each in every for finding in each.report.findings)
        leaks = tuple(leak for each in every for leak in each.leaks)
        return SavedReport(1, replace(every[0].report, findings=findings), leaks)

    def _parse(self, place: int, is_wanted: Callable[[Any], bool]) -> Iterator[SavedReport]:
        """The report at a place, if it is wanted."""
        line, text = self._documents[place]
        where = self.name if len(self) == 1 else f"{self.name}, line {line}"
        try:
            data = json.loads(text)
            if is_wanted(data):
                yield _to_saved(place + 1, data)
        except ReportFormatError as error:
            raise ReportFormatError(f"{where}: {error}") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise ReportFormatError(f"{where}: not JSON: {error}") from None


def _process_of(data: Any) -> tuple[str, ...] | None:
    """Whose report it is; None for what is not a report."""
    try:
        return str(data["host"]), str(data["pid"]), str(data["command"])
    except (TypeError, LookupError):
        return None


def _to_saved(number: int, data: Any) -> SavedReport:
    if not isinstance(data, dict) or data.get("schema") != TEST_SCHEMA:
        report = from_dict(data)
        return SavedReport(number, report, report.leaks)
    report = from_dict(data.get("report", {}))
    owner = SavedOwner(
        name=str(data.get("owner")),
        kind=str(data.get("kind")),
        outcome=str(data.get("outcome")),
        waited=seconds if isinstance(seconds := data.get("waited"), float) else 0.0,
        reason=str(reason) if (reason := data.get("reason")) else None,
        defined_at=str(place) if (place := data.get("defined_at")) else None,
    )
    # What a test has left open is its leak, even if the connection is a healthy one.
    return SavedReport(number, report, () if owner.outcome in _EXCUSED else report.findings, owner)


# For these pytest fails nothing.
_EXCUSED = ("allowed", "known", "library_default", "still_running")


def _split(data: bytes) -> Iterator[tuple[int, bytes]]:
    """JSON lines begin and end with a brace; anything else is one document of many lines."""
    lines = [(place, line) for place, line in enumerate(data.splitlines(), 1) if line.strip()]
    if not lines:
        return
    if len(lines) == 1 or lines[0][1].strip().endswith(b"}"):
        yield from lines
    else:
        yield 1, data
