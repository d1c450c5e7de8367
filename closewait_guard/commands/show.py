"""`show`: print saved reports, or what has changed from one to another, site by site.

A file holds one JSON document, or JSON lines; of these only what is asked for is read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from closewait_guard._config import shown, whole_number_parser
from closewait_guard._format import wrap_text
from closewait_guard._processes import group_by_peer
from closewait_guard._render import from_dict, site_lines
from closewait_guard._stream import print_error
from closewait_guard.commands._output import FINE, LEAKS_FOUND, say
from closewait_guard.exceptions import ReportFormatError
from closewait_guard.model import Report, SiteGroup

if TYPE_CHECKING:
    from closewait_guard.model import Report

__all__ = [
    "Saved",
    "Selection",
    "difference",
    "number",
]


_DESCRIPTION = """\
Tells saved reports: a JSON document or JSON lines, as written by the reporter
json_lines, by `scan --json`, or from to_dict(). Of several, prints the last."""
_EPILOG = """\
exit codes: 0 printed, 1 leaks found by --fail-on-leak, 2 usage or no report
examples:   closewait-guard show leaks.jsonl --range 3:5
            closewait-guard show --diff monday.json friday.json
            closewait-guard show leaks.jsonl --diff 1 -1   (the last is -1)"""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("file", nargs="?", metavar="FILE", help="the reports; - for stdin")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", metavar="N", help="the last N of several; 1 if left out")
    which.add_argument("--range", metavar="N[:M]", help="these of several, counted from 1")
    which.add_argument("--every", action="store_true", help="all of several")
    which.add_argument(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="what is new, gone or growing: two files, or two numbers in FILE",
    )
    parser.add_argument(
        "--fail-on-leak", action="store_true", help="exit with 1 if a leak was printed"
    )
    parser.set_defaults(run=lambda arguments: run(arguments, parser))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Read, and print."""
    if arguments.file is None and not arguments.diff:
        parser.error("FILE is needed, or --diff A B")
    reports = _print_difference(arguments) if arguments.diff else _print_reports(arguments)
    leaks = any(report.leaks for report in reports)
    return LEAKS_FOUND if arguments.fail_on_leak and leaks else FINE


def _print_reports(arguments: argparse.Namespace) -> list[Report]:
    from closewait_guard._render import render_text

    saved = Saved(arguments.file)
    chosen = _choose(arguments, saved)
    for place, (number, report) in enumerate(chosen):
        which = f"Report {number} of {len(saved)}" if len(saved) > 1 else "Report"
        if place:
            say("")
        say(f"{which} of {_heading(report)}\n\n{render_text(report)}", end="")
    return [report for _, report in chosen]


def _choose(arguments: argparse.Namespace, saved: Saved) -> list[tuple[int, Report]]:

    if arguments.range or arguments.every:
        selection = Selection(arguments.range or "1:-1")
        return saved.at(selection.of(len(saved), saved.name))
    return saved.latest(abs(number(arguments.last or "1", "--last")))


def _print_difference(arguments: argparse.Namespace) -> list[Report]:

    if arguments.file is None:
        before, after = (Saved(path).latest(1)[0][1] for path in arguments.diff)
    else:
        saved = Saved(arguments.file)
        before, after = (saved.one(number(text, "--diff")) for text in arguments.diff)
    say(f"From {_heading(before)}")
    say(f"to   {_heading(after)}\n")
    for line in difference(before, after):
        say(line)
    return [after]


def _heading(report: Report) -> str:
    from closewait_guard._format import format_time, truncate

    name = report.command or "a program without a name"
    return truncate(
        f"{format_time(report.taken_at, ' %Z')}, {name}, process {report.pid} on {report.host}"
    )


_MAX_BYTES = 1 << 29


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
    what = "the number of a report, from 1, or from -1 backwards"
    try:
        return whole_number_parser(what, bool)(text)
    except ValueError as error:
        raise ReportFormatError(f"{option} must be {error}, not {shown(text)}") from None


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
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            # A device, for instance, never ends.
            raise ReportFormatError(f"{self.name} is larger than {_MAX_BYTES:,} bytes")
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
                found.append((place + 1, self._parse(place)))
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

    def _parse(self, place: int) -> Report:
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


def difference(before: Report, after: Report) -> Iterator[str]:
    """Lines: how many sites are new, growing, shrinking and gone, then each of them."""
    old, new = _by_name(before), _by_name(after)
    changes = {name: new[name].count - old[name].count for name in new if name in old}
    kinds = {
        "NEW": [name for name in new if name not in old],
        "GROWING": [name for name, change in changes.items() if change > 0],
        "SHRINKING": [name for name, change in changes.items() if change < 0],
        "GONE": [name for name in old if name not in new],
        "UNCHANGED": [name for name, change in changes.items() if not change],
    }
    parts = [f"{len(names)} {kind.lower()}" for kind, names in kinds.items() if names]
    sockets = f"{before.open_sockets:,} open sockets then, {after.open_sockets:,} now"
    descriptors = f"{_used(before)} descriptors then, {_used(after)} now"
    yield from wrap_text(f"Sites: {', '.join(parts) or 'none'}; {sockets}; {descriptors}", "  ")
    for kind, names in kinds.items():
        for name in names if kind != "UNCHANGED" else ():
            yield ""
            yield from _site_change(kind, old.get(name), new.get(name))


def _site_change(kind: str, old: SiteGroup | None, new: SiteGroup | None) -> Iterator[str]:
    group = new or old
    if group is None:
        return
    if old and new:
        change = new.count - old.count
        kind += f", from {old.count:,} to {new.count:,} ({change:+,})"
    yield f"{kind}:"
    yield from site_lines(group)


def _by_name(report: Report) -> dict[str, SiteGroup]:
    """By what names a site in whatever process; without a stack, the peers distinguish sites."""
    groups: dict[str, SiteGroup] = {}
    for group in report.by_site():
        if not group.verdict.is_leak:
            # What is closing at one moment is gone at the next, and no news.
            continue
        if group.site is None:
            for (_, peer), findings in group_by_peer(group.findings).items():
                name = f"{group.fingerprint} {peer}"
                groups[name] = replace(group, findings=tuple(findings))
        else:
            groups[group.fingerprint] = group
    return groups


def _used(report: Report) -> str:
    return "an unknown number of" if report.fd_used is None else f"{report.fd_used:,}"
