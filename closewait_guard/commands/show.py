"""`show`: print saved reports, or what has changed from one to another, site by site.

A file holds one JSON document, or JSON lines; of these only what is asked for is read. Lines of the
pytest plugin have a report each, of one test or fixture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, NamedTuple

from closewait_guard._format import Layout, escape_line, pluralize
from closewait_guard._render import (
    LastReport,
    difference,
    from_dict,
    has_more,
    not_covered_lines,
    program_name,
    render_family,
    render_report,
    sum_reports,
)
from closewait_guard._stream import layout_of, print_error
from closewait_guard.commands._output import FINE, LEAKS_FOUND, USAGE, say
from closewait_guard.commands._parser import Selection, number
from closewait_guard.exceptions import MissingExtraError, ReportFormatError
from closewait_guard.model import TEST_SCHEMA, Finding, Report

__all__ = [
    "Saved",
    "SavedOwner",
    "SavedReport",
    "print_programs",
]


_DESCRIPTION = """\
Print saved reports: JSON from to_dict() or `scan --json`, JSON lines from the
json_lines reporter, or pytest's --socket-leaks-json. By default print the last
report of each process, those of one program merged, and all of a pytest run."""
_EPILOG = """\
exit status: 0 printed, 1 leaks (--fail-on-leak), 2 usage error or unreadable
examples:    closewait-guard show leaks.jsonl --range 3:5
             closewait-guard show --diff monday.json friday.json
             closewait-guard show leaks.jsonl --diff 1 -1    # first, last"""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("file", nargs="?", metavar="FILE", help="file with reports, - for stdin")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", metavar="N", help="print the last N reports, not merged")
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
        help="print all calls, threads and holders, and what is not a leak",
    )
    parser.add_argument(
        "--fail-on-leak",
        action="store_true",
        help="exit with status 1 for leaks; with --diff, for new ones",
    )
    parser.set_defaults(run=lambda arguments: run(arguments, parser))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Read, and print."""
    if arguments.file is None and not arguments.diff:
        parser.error("missing FILE (or use --diff A B)")
    show = _print_difference if arguments.diff else _print_saved
    verdict = show(arguments)
    return verdict if arguments.fail_on_leak else FINE


def _print_saved(arguments: argparse.Namespace) -> int:
    saved = Saved(arguments.file)
    is_default = not (arguments.range or arguments.all or arguments.last or saved.is_of_tests)
    chosen = saved.latest_of_each_process() if is_default else _choose(arguments, saved)
    if saved.is_of_tests:
        _print_tests(chosen, len(saved), arguments)
    elif is_default and len(chosen) > 1:
        _print_merged(chosen, len(saved), arguments)
    else:
        _print_reports(chosen, len(saved), arguments)
    return _exit_status(any(each.leaks for each in chosen), saved)


def _exit_status(has_leaks: bool, *files: Saved) -> int:
    """What could not be read, or looked at, may have had leaks."""
    if has_leaks:
        return LEAKS_FOUND
    return USAGE if any(each.is_incomplete for each in files) else FINE


def _print_merged(of_each: list[SavedReport], many: int, arguments: argparse.Namespace) -> None:
    layout = layout_of(sys.stdout, everything=arguments.verbose, verbose=arguments.verbose)
    say(f"Last report of each of {len(of_each)} processes, of {many} reports (--all prints each)")
    print_programs([each.report for each in of_each], layout)


def print_programs(reports: Sequence[Report], layout: Layout, *, is_complete: bool = True) -> None:
    """Each program by itself; one that never had a socket only where no other had any."""
    now = max(report.taken_at for report in reports)
    programs: dict[tuple[str, str], list[LastReport]] = {}
    for report in sorted(reports, key=lambda report: report.pid):
        member = LastReport(report, is_last=now - report.taken_at < _MAX_SECONDS_APART)
        programs.setdefault((report.host, report.command), []).append(member)
    families = list(programs.values())
    with_sockets = [each for each in families if any(member.has_sockets for member in each)]
    shown = with_sockets or families
    say("\n".join(render_family(each, layout, is_complete=is_complete) for each in shown), end="")


# The processes of a program report at the same intervals, or as it ends, one after another.
_MAX_SECONDS_APART = 60.0


def _print_reports(chosen: list[SavedReport], many: int, arguments: argparse.Namespace) -> None:
    layout = layout_of(sys.stdout, verbose=arguments.verbose)
    for place, each in enumerate(chosen):
        if place:
            say("")
        if many > 1:
            say(f"Report {each.number} of {many}")
        say(render_report(each.report, layout), end="")


def _print_tests(chosen: list[SavedReport], many: int, arguments: argparse.Namespace) -> None:
    layout = layout_of(sys.stdout, verbose=arguments.verbose)
    outcomes = Counter(each.owner.outcome_in_words for each in chosen if each.owner)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    say(f"{len(chosen)} of {pluralize(many, 'report')} of a test run: {counts}")
    for each in chosen:
        say(f"\nReport {each.number} of {many}")
        if each.owner is None:
            say(render_report(each.report, layout), end="")
        else:
            say(f"{each.owner.title}\n{_failure_text(each.report, each.owner, layout)}")
    # What was open before the first test is no test's.
    coverage = replace(chosen[-1].report.coverage, adopted=0)
    for line in not_covered_lines(coverage, layout):
        say(f"\n{line.text}")


def _failure_text(report: Report, owner: SavedOwner, layout: Layout) -> str:
    """As pytest shows it: what a test has left open is its leak, whatever it is of a program."""
    plugin = _texts_of_plugin()
    # The text is the same for each outcome.
    finding = plugin.OwnerFinding(
        owner=owner.name,
        nodeid="",
        kind=owner.kind,
        outcome="failed",
        waited=owner.waited,
        reason=owner.reason,
        report=report,
        defined_at=owner.defined_at,
    )
    root = Path(layout.directory or "/")
    text: str = plugin.failure_text(finding, root, width=layout.width, whole_stacks=layout.verbose)
    return text


def _texts_of_plugin() -> ModuleType:
    """What words pytest's errors: loaded, as pytest is, for a file of tests only."""
    try:
        from closewait_guard.pytest_plugin import _text
    except ModuleNotFoundError as missing:
        raise MissingExtraError(
            f"the reports of a test run need pytest: pip install pytest ({missing})"
        ) from missing
    return _text


def _choose(arguments: argparse.Namespace, saved: Saved) -> list[SavedReport]:
    is_every = arguments.all or (saved.is_of_tests and not arguments.last)
    if arguments.range or is_every:
        selection = Selection(arguments.range or "1:-1")
        return saved.at(selection.of(len(saved), saved.name))
    return saved.latest(abs(number(arguments.last or "1", "--last")))


def _print_difference(arguments: argparse.Namespace) -> int:
    if arguments.file is None:
        files = [Saved(path) for path in arguments.diff]
        before, after = (saved.whole() for saved in files)
    else:
        files = [Saved(arguments.file)]
        before, after = (files[0].one(number(text, "--diff")) for text in arguments.diff)
    names = [_program(each.report) for each in (before, after)]
    if names[0] != names[1]:
        print_error(f"warning: the reports are of different programs, {' and '.join(names)}")
    say(f"From {_heading(before)}")
    say(f"to   {_heading(after)}\n")
    layout = layout_of(sys.stdout, everything=True, verbose=arguments.verbose)
    of_tests = files[-1].is_of_tests
    lines_of_test = _texts_of_plugin().leak_lines if of_tests else None
    for line in difference(before.report, after.report, layout, lines_of_test):
        say(line)
    old, new = (replace(each.report, findings=each.leaks) for each in (before, after))
    return _exit_status(has_more(old, new, of_tests=of_tests), *files)


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
    return f"{heading}\n{owner.title}" if owner else heading


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
        is_incomplete: Whether a line that was asked for is not a report, or says that leaks of a
            test are unknown.

    Raises:
        ReportFormatError: The file cannot be read, or holds no report.
    """

    def __init__(self, path: str) -> None:
        self.name = "stdin" if path == "-" else path
        self.is_incomplete = False
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
        self.is_incomplete |= any(each.owner and each.owner.outcome == "unknown" for each in found)
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
_EXCUSED = ("allowed", "library_default", "still_running")


def _split(data: bytes) -> Iterator[tuple[int, bytes]]:
    """JSON lines begin and end with a brace; anything else is one document of many lines."""
    lines = [(place, line) for place, line in enumerate(data.splitlines(), 1) if line.strip()]
    if not lines:
        return
    if len(lines) == 1 or lines[0][1].strip().endswith(b"}"):
        yield from lines
    else:
        yield 1, data
