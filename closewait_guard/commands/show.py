"""`show`: print saved reports, or what has changed from one to another, site by site.

A file holds one JSON document, or JSON lines; of these only what is asked for is read. Lines of the
pytest plugin have a report each, of one test or fixture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from closewait_guard._config import refusal, whole_number_parser
from closewait_guard._format import Layout, block_lines, escape_line
from closewait_guard._processes import group_by_peer
from closewait_guard._render import (
    LastReport,
    describe_site,
    from_dict,
    program_name,
    render_family,
    render_report,
    sum_reports,
)
from closewait_guard._stream import layout_of, print_error
from closewait_guard.commands._output import FINE, LEAKS_FOUND, say
from closewait_guard.exceptions import ReportFormatError
from closewait_guard.model import TEST_SCHEMA, Report, SiteGroup, Verdict

if TYPE_CHECKING:
    from closewait_guard.model import Report

__all__ = [
    "Saved",
    "SavedReport",
    "Selection",
    "difference",
    "number",
]


_DESCRIPTION = """\
Print saved reports: JSON from to_dict() or `scan --json`, JSON lines from the
json_lines reporter, or pytest's --socket-leaks-json. By default print the last
report of each process, those of one program merged, and all of a pytest run."""
_EPILOG = """\
exit status: 0 printed, 1 leaks (--fail-on-leak), 2 usage error or no report
examples:    closewait-guard show leaks.jsonl --range 3:5
             closewait-guard show --diff monday.json friday.json
             closewait-guard show leaks.jsonl --diff 1 -1    # first, last"""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("file", nargs="?", metavar="FILE", help="file with reports, - for stdin")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", metavar="N", help="print the last N reports (default: 1)")
    which.add_argument("--range", metavar="N[:M]", help="print reports N to M, counting from 1")
    which.add_argument("--all", action="store_true", help="print every report")
    which.add_argument(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="compare two files, or two reports of FILE by number",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="print all calls, threads and holders, and what is no leak",
    )
    parser.add_argument(
        "--fail-on-leak",
        action="store_true",
        help="exit with status 1 if a printed report has leaks",
    )
    parser.set_defaults(run=lambda arguments: run(arguments, parser))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Read, and print."""
    if arguments.file is None and not arguments.diff:
        parser.error("missing FILE (or use --diff A B)")
    shown = _print_difference(arguments) if arguments.diff else _print_saved(arguments)
    leaks = any(saved.has_leaks for saved in shown)
    return LEAKS_FOUND if arguments.fail_on_leak and leaks else FINE


def _print_saved(arguments: argparse.Namespace) -> list[SavedReport]:
    saved = Saved(arguments.file)
    is_default = not (arguments.range or arguments.all or arguments.last or saved.is_of_tests)
    chosen = saved.latest_of_each_process() if is_default else _choose(arguments, saved)
    print_chosen = _print_merged if is_default and len(chosen) > 1 else _print_reports
    print_chosen(chosen, len(saved), arguments)
    return chosen


def _print_merged(of_each: list[SavedReport], many: int, arguments: argparse.Namespace) -> None:
    """Each program by itself; one that never had a socket only where no other had any."""
    layout = layout_of(sys.stdout, everything=arguments.verbose, verbose=arguments.verbose)
    say(f"Last report of each of {len(of_each)} processes, of {many} reports (--all prints each)")
    now = max(each.report.taken_at for each in of_each)
    programs: dict[tuple[str, str], list[LastReport]] = {}
    for each in sorted(of_each, key=lambda each: each.report.pid):
        report = each.report
        member = LastReport(report, is_last=now - report.taken_at < _MAX_SECONDS_APART)
        programs.setdefault((report.host, report.command), []).append(member)
    families = list(programs.values())
    with_sockets = [each for each in families if any(member.has_sockets for member in each)]
    for place, family in enumerate(with_sockets or families):
        if place:
            say("")
        say(render_family(family, layout), end="")


# The processes of a program report at the same intervals, or as it ends, one after another.
_MAX_SECONDS_APART = 60.0


def _print_reports(chosen: list[SavedReport], many: int, arguments: argparse.Namespace) -> None:
    layout = layout_of(sys.stdout, verbose=arguments.verbose)
    for place, each in enumerate(chosen):
        if place:
            say("")
        if many > 1:
            say(f"Report {each.number} of {many}")
        if each.owner:
            say(escape_line(each.owner))
        # What a test has left open is its leak, whatever it would be of a program.
        layout = layout._replace(everything=arguments.verbose or bool(each.owner))
        say(render_report(each.report, layout), end="")


def _choose(arguments: argparse.Namespace, saved: Saved) -> list[SavedReport]:
    is_every = arguments.all or (saved.is_of_tests and not arguments.last)
    if arguments.range or is_every:
        selection = Selection(arguments.range or "1:-1")
        return saved.at(selection.of(len(saved), saved.name))
    return saved.latest(abs(number(arguments.last or "1", "--last")))


def _print_difference(arguments: argparse.Namespace) -> list[SavedReport]:
    if arguments.file is None:
        before, after = (Saved(path).whole() for path in arguments.diff)
    else:
        saved = Saved(arguments.file)
        before, after = (saved.one(number(text, "--diff")) for text in arguments.diff)
    names = [_program(each.report) for each in (before, after)]
    if names[0] != names[1]:
        print_error(f"warning: the reports are of different programs, {' and '.join(names)}")
    say(f"From {_heading(before)}")
    say(f"to   {_heading(after)}\n")
    layout = layout_of(sys.stdout, everything=True, verbose=arguments.verbose)
    for line in difference(before.report, after.report, layout):
        say(line)
    return [after]


def _program(report: Report) -> str:
    """A program's name as far as it is the same from inside and outside, and in each folder."""
    name = program_name(report.command, Layout())
    return PurePath(name.rpartition(" ")[2]).name or "a program without a name"


def _heading(saved: SavedReport) -> str:
    from closewait_guard._format import format_time, truncate

    report, owner = saved.report, saved.owner
    name = report.command or "a program without a name"
    who = f"process {report.pid}" if saved.processes == 1 else f"{saved.processes} processes"
    when = format_time(report.taken_at, " %Z")
    heading = truncate(f"{when}, {name}, {who} on {report.host}")
    return f"{heading}\n{escape_line(owner)}" if owner else heading


_MAX_BYTES = 1 << 29
# The schema is the first value of a line.
_MAX_PREFIX = 100


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
            raise ReportFormatError(f"{where} has {many} reports, and none at {self._text}")
        return chosen


def number(text: str, option: str) -> int:
    """A place as it is typed."""
    what = "the number of a report, from 1, or from -1 backwards"
    try:
        return whole_number_parser(what, bool)(text)
    except ValueError as error:
        raise ReportFormatError(f"{option}: {refusal(error, text)}") from None


def _place(typed: int, many: int) -> int:
    return typed - 1 if typed > 0 else many + typed


class SavedReport(NamedTuple):
    """One report of a file.

    Attributes:
        number: Its place there, from 1.
        owner: The test or fixture that it is of, and what became of that; empty for others.
        has_leaks: Whether anything in it is a leak; of a test, whether that was not allowed to.
        processes: Of how many it is the sum.
    """

    number: int
    report: Report
    owner: str
    has_leaks: bool
    processes: int = 1


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

    def at(self, places: Iterable[int], most: int | None = None) -> list[SavedReport]:
        """The reports at some places; no more than `most`.

        Raises:
            ReportFormatError: There is none at any of the places.
        """
        found: list[SavedReport] = []
        failures: list[ReportFormatError] = []
        for place in places:
            if len(found) == most:
                break
            try:
                found.append(self._parse(place))
            except ReportFormatError as error:
                failures.append(error)
        if not found:
            raise failures[0]
        for failure in failures:
            print_error(str(failure))
        return found

    def latest(self, many: int) -> list[SavedReport]:
        """The last that can be read: who writes at this moment has not ended the last line."""
        return self.at(reversed(range(len(self))), many)[::-1]

    def latest_of_each_process(self) -> list[SavedReport]:
        """Of each process the last report that can be read, the latest first."""
        known, places = set[object](), list[int]()
        for place in reversed(range(len(self))):
            process = _process_in(self._documents[place][1])
            if process is None or process not in known:
                places.append(place)
                known.add(process)
        return self.at(places)

    def one(self, typed: int) -> SavedReport:
        """The report of a number as it is typed."""
        [saved] = self.at(Selection(str(typed)).of(len(self), self.name))
        return saved

    def whole(self) -> SavedReport:
        """The last report of each process as one; of tests, the findings of all."""
        if not self.is_of_tests:
            each = self.latest_of_each_process()
            report = sum_reports([saved.report for saved in each]) if each[1:] else each[0].report
            has_leaks = any(saved.has_leaks for saved in each)
            return SavedReport(each[0].number, report, "", has_leaks, len(each))
        every = self.at(range(len(self)))
        findings = tuple(finding for each in every for finding in each.report.findings)
        has_leaks = any(each.has_leaks for each in every)
        return SavedReport(1, replace(every[0].report, findings=findings), "", has_leaks)

    def _parse(self, place: int) -> SavedReport:
        line, text = self._documents[place]
        where = self.name if len(self) == 1 else f"{self.name}, line {line}"
        try:
            return _to_saved(place + 1, json.loads(text))
        except ReportFormatError as error:
            raise ReportFormatError(f"{where}: {error}") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise ReportFormatError(f"{where}: not JSON: {error}") from None


def _process_in(text: bytes) -> tuple[object, ...] | None:
    """Whose report it is; None for what is no report."""
    try:
        data = json.loads(text)
        return str(data["host"]), str(data["pid"]), str(data["command"])
    except (ValueError, TypeError, LookupError, RecursionError, MemoryError):
        return None


def _to_saved(number: int, data: Any) -> SavedReport:
    if not isinstance(data, dict) or data.get("schema") != TEST_SCHEMA:
        report = from_dict(data)
        return SavedReport(number, report, "", bool(report.leaks))
    report, outcome, reason = (
        from_dict(data.get("report", {})),
        data.get("outcome"),
        data.get("reason"),
    )
    title = f"{data.get('owner')} ({outcome}{f': {reason}' if reason else ''})"
    # What a test has left open is its leak, even if the connection is a healthy one.
    return SavedReport(number, report, title, outcome not in ("allowed", "library_default"))


def _split(data: bytes) -> Iterator[tuple[int, bytes]]:
    """JSON lines begin and end with a brace; anything else is one document of many lines."""
    lines = [(place, line) for place, line in enumerate(data.splitlines(), 1) if line.strip()]
    if not lines:
        return
    if len(lines) == 1 or lines[0][1].strip().endswith(b"}"):
        yield from lines
    else:
        yield 1, data


def difference(before: Report, after: Report, layout: Layout | None = None) -> Iterator[str]:
    """Lines: how many sites are new, growing, shrinking and gone, then each of them."""
    layout = layout or Layout()
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
    yield from layout.wrap(f"Sites: {', '.join(parts) or 'none'}; {sockets}; {descriptors}", "  ")
    for kind, names in kinds.items():
        for name in names if kind != "UNCHANGED" else ():
            yield ""
            yield from _site_change(kind, old.get(name), new.get(name), layout)


def _site_change(
    kind: str, old: SiteGroup | None, new: SiteGroup | None, layout: Layout
) -> Iterator[str]:
    group = new or old
    if group is None:
        return
    if old and new:
        change = new.count - old.count
        kind += f", from {old.count:,} to {new.count:,} ({change:+,})"
    yield f"{kind}:"
    block = describe_site(group, verbose=layout.verbose)
    yield from (line.text for line in block_lines(block, layout))


def _by_name(report: Report) -> dict[str, SiteGroup]:
    """By what names a site in whatever process; without a stack, the peers distinguish sites."""
    groups: dict[str, SiteGroup] = {}
    for group in report.by_site():
        if not group.verdict.is_leak and group.verdict is not Verdict.OPEN:
            # What is closing at one moment is gone at the next, and no news. What is open is in the
            # reports of tests only, for which it is a leak.
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
