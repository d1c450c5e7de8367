"""`show`: print saved reports, or what has changed from one to another, site by site."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from types import ModuleType

from closewait_guard._format import Layout, pluralize
from closewait_guard._render import (
    LastReport,
    Part,
    difference,
    has_more,
    not_covered_lines,
    program_name,
    render_report,
)
from closewait_guard._stream import layout_of, print_error
from closewait_guard.commands._output import FINE, NO_VERDICT, gate_status, has_leaked, say
from closewait_guard.commands._parser import Selection, add_files, number
from closewait_guard.commands._reports import ReportFiles, parts_of, print_programs, programs_of
from closewait_guard.commands._saved import Saved, SavedOwner, SavedReport
from closewait_guard.exceptions import MissingExtraError
from closewait_guard.model import Report

_USAGE = "closewait-guard show [options] FILE | [FILE] --diff A B"
_DESCRIPTION = """\
Print saved reports: JSON from to_dict() or `scan --json`, JSON lines from the
json_lines reporter, or pytest's --socket-leaks-json. By default print the last
report of each process, those of one program merged, and all of a pytest run."""
_EPILOG = """\
exit status: 0 printed, 2 error; with --fail-on-leak 1 leaks, 87 unknown
examples:    closewait-guard show leaks.jsonl --range 3:5
             closewait-guard show --diff monday.json friday.json
             closewait-guard show leaks.jsonl --diff 1 -1    # first, last"""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.usage, parser.description, parser.epilog = _USAGE, _DESCRIPTION, _EPILOG
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
        help="print all calls and holders, and what is not a leak",
    )
    parser.add_argument(
        "--fail-on-leak",
        action="store_true",
        help="exit with status 1 for leaks; with --diff, for new ones",
    )
    add_files(parser)
    parser.set_defaults(run=lambda arguments: run(arguments, parser))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Read, and print."""
    if arguments.file is None and not arguments.diff:
        parser.error("missing FILE (or use --diff A B)")
    if arguments.diff and (arguments.html or arguments.collapsed):
        parser.error("--html and --collapsed write reports, not what --diff compares")
    return _print_difference(arguments) if arguments.diff else _print_saved(arguments)


def _print_saved(arguments: argparse.Namespace) -> int:
    files = ReportFiles(arguments)
    saved = Saved(arguments.file)
    is_default = not (arguments.range or arguments.all or arguments.last or saved.is_of_tests)
    chosen = saved.latest_of_each_process() if is_default else _choose(arguments, saved)
    many = len(saved)
    parts = [_part_of(each, many) for each in chosen]
    if saved.is_of_tests:
        _print_tests(chosen, many, arguments)
    elif is_default and len(chosen) > 1:
        programs = programs_of([each.report for each in chosen])
        _print_merged(programs, f"{len(chosen)} processes, of {many}", arguments)
        parts = parts_of(programs)
    else:
        _print_reports(chosen, many, arguments)
    files.write(parts)
    if not arguments.fail_on_leak:
        return FINE
    has_leaks = any(each.leaks for each in chosen)
    if not saved.is_of_tests:
        has_leaks = any(has_leaked(each.report) for each in chosen)
    return _exit_status(chosen, [saved], has_leaks=has_leaks)


def _exit_status(of: Iterable[SavedReport], files: Sequence[Saved], *, has_leaks: bool) -> int:
    """What could not be read, or looked at, may have had leaks."""
    # For a test the plugin has decided what is unknown.
    reports = [each.report for each in of if each.owner is None]
    is_complete = not any(file.is_incomplete for file in files)
    status = gate_status(reports, has_leaks=has_leaks, is_complete=is_complete)
    has_unknown = any(file.has_unknown for file in files)
    return NO_VERDICT if status == FINE and has_unknown else status


def _print_merged(
    programs: Sequence[Sequence[LastReport]], counts: str, arguments: argparse.Namespace
) -> None:
    layout = layout_of(sys.stdout, everything=arguments.verbose, verbose=arguments.verbose)
    say(f"Last report of each of {counts} reports (--all prints each)")
    print_programs(programs, layout)


def _part_of(each: SavedReport, many: int) -> Part:
    """A report by itself, named as it is printed."""
    title = f"Report {each.number} of {many}" if many > 1 else ""
    return Part([LastReport(each.report)], each.owner.title if each.owner else title)


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
    if not arguments.fail_on_leak:
        return FINE
    old, new = (replace(each.report, findings=each.leaks) for each in (before, after))
    has_leaks = has_more(old, new, of_tests=of_tests)
    if not of_tests:
        has_leaks |= new.coverage.forgotten > old.coverage.forgotten
        after = after._replace(report=_with_omitted_unknown(new))
    return _exit_status(() if of_tests else [after], files, has_leaks=has_leaks)


def _with_omitted_unknown(report: Report) -> Report:
    """For a comparison: whether the leaks that were left out are more than before, no one knows."""
    if not report.omitted:
        return report
    why = f"{pluralize(report.omitted, 'leak')} left out of its report"
    coverage = report.coverage
    unknown = (*coverage.leaks_unknown, why)
    return replace(report, coverage=replace(coverage, leaks_unknown=unknown))


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
