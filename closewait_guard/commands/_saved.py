"""Saved reports: a file of one JSON document or of JSON lines, read as far as it is asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

from closewait_guard._parse import shown
from closewait_guard._serial import from_dict
from closewait_guard._stream import print_error
from closewait_guard.exceptions import ReportFormatError
from closewait_guard.model import Report

__all__ = ["Saved", "Selection", "number"]


_MOST_BYTES = 1 << 29


class Selection:
    """`3`, `-1`, `2:5`, `-3:` as places in a sequence: from 1, or from the end, ends included."""

    def __init__(self, text: str) -> None:
        self._text = text
        first, colon, last = text.partition(":")
        self._first = number(first or "1", "--range")
        self._last = number(last or "-1", "--range") if colon else self._first

    def of(self, many: int, where: str) -> range:
        """The places, from 0, in so many."""
        first, last = _place(self._first, many), _place(self._last, many)
        chosen = range(max(first, 0), min(last, many - 1) + 1)
        if not chosen:
            raise ReportFormatError(f"{where} has {many} reports: none is {self._text}")
        return chosen


def number(text: str, option: str) -> int:
    """A place as it is typed."""
    try:
        found = int(text)
    except ValueError:
        found = 0
    if not found:
        raise ReportFormatError(f"{option}: not the number of a report: {shown(text)}")
    return found


def _place(typed: int, many: int) -> int:
    return typed - 1 if typed > 0 else many + typed


class Saved:
    """The reports of one file; a line that is none is complained of and left out.

    Args:
        path: The file; `-` is stdin.

    Raises:
        ReportFormatError: The file cannot be read, or holds no report.
    """

    def __init__(self, path: str) -> None:
        self.name = "stdin" if path == "-" else path
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
            raise ReportFormatError(f"{self.name} is empty: there is no report in it")

    def _read(self, path: str) -> bytes:
        if path == "-" and sys.stdin is None:
            raise ReportFormatError("stdin is closed")
        with nullcontext(sys.stdin.buffer) if path == "-" else Path(path).open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            # A device, for instance, never ends.
            raise ReportFormatError(f"{self.name} is larger than {_MOST_BYTES:,} bytes")
        return data

    def __len__(self) -> int:
        return len(self._documents)

    def at(self, places: Iterable[int], most: int | None = None) -> list[tuple[int, Report]]:
        """The reports at some places, with their numbers from 1; no more than `most`.

        Raises:
            ReportFormatError: There is none at any of the places.
        """
        found: list[tuple[int, Report]] = []
        failures: list[ReportFormatError] = []
        for place in places:
            if len(found) == most:
                break
            try:
                found.append((place + 1, self._parsed(place)))
            except ReportFormatError as error:
                failures.append(error)
        if not found:
            raise failures[0]
        for failure in failures:
            print_error(str(failure))
        return found

    def latest(self, many: int) -> list[tuple[int, Report]]:
        """The last that can be read: who writes at this moment has not ended the last line."""
        return self.at(reversed(range(len(self))), many)[::-1]

    def one(self, typed: int) -> Report:
        """The report of a number as it is typed."""
        ((_, report),) = self.at(Selection(str(typed)).of(len(self), self.name))
        return report

    def _parsed(self, place: int) -> Report:
        line, text = self._documents[place]
        where = self.name if len(self) == 1 else f"{self.name}, line {line}"
        try:
            return from_dict(json.loads(text))
        except ReportFormatError as error:
            raise ReportFormatError(f"{where}: {error}") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise ReportFormatError(f"{where}: not a report, and no JSON: {error}") from None


def _split(data: bytes) -> Iterator[tuple[int, bytes]]:
    """JSON lines begin and end with a brace; anything else is one document of many lines."""
    lines = [(place, line) for place, line in enumerate(data.splitlines(), 1) if line.strip()]
    if not lines:
        return
    if len(lines) == 1 or lines[0][1].strip().endswith(b"}"):
        yield from lines
    else:
        yield 1, data
