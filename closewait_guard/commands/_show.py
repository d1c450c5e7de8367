"""`show`: tell saved reports again, or what has changed from one to another."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from closewait_guard.commands._codes import FINE, LEAKS_FOUND
from closewait_guard.commands._output import say

if TYPE_CHECKING:
    from closewait_guard.commands._saved import Saved
    from closewait_guard.model import Report

_DESCRIPTION = """\
Tells saved reports: a JSON document or JSON lines, as written by the reporter
json_lines, by `scan --json`, or from to_dict(). Of several, tells the last."""
_EPILOG = """\
exit codes: 0 told, 1 leaks found by --fail-on-leak, 2 usage or no report
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
        "--fail-on-leak", action="store_true", help="exit with 1 if a leak was told"
    )
    parser.set_defaults(run=lambda arguments: run(arguments, parser))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Read, and tell."""
    if arguments.file is None and not arguments.diff:
        parser.error("FILE is needed, or --diff A B")
    reports = _told_difference(arguments) if arguments.diff else _told_reports(arguments)
    leaks = any(report.accused for report in reports)
    return LEAKS_FOUND if arguments.fail_on_leak and leaks else FINE


def _told_reports(arguments: argparse.Namespace) -> list[Report]:
    from closewait_guard._render import render_text
    from closewait_guard.commands._saved import Saved

    saved = Saved(arguments.file)
    chosen = _chosen(arguments, saved)
    for place, (number, report) in enumerate(chosen):
        which = f"Report {number} of {len(saved)}" if len(saved) > 1 else "Report"
        if place:
            say("")
        say(f"{which} of {_heading(report)}\n\n{render_text(report)}", end="")
    return [report for _, report in chosen]


def _chosen(arguments: argparse.Namespace, saved: Saved) -> list[tuple[int, Report]]:
    from closewait_guard.commands._saved import Selection, number

    if arguments.range or arguments.every:
        selection = Selection(arguments.range or "1:-1")
        return saved.at(selection.of(len(saved), saved.name))
    return saved.latest(abs(number(arguments.last or "1", "--last")))


def _told_difference(arguments: argparse.Namespace) -> list[Report]:
    from closewait_guard.commands._difference import difference
    from closewait_guard.commands._saved import Saved, number

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
    from closewait_guard._lines import cut
    from closewait_guard._words import date

    name = report.command or "a program without a name"
    return cut(f"{date(report.taken_at, ' %Z')}, {name}, process {report.pid} on {report.host}")
