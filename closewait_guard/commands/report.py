"""`report`: what guarded processes say of themselves while they run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from closewait_guard.commands._output import FINE, USAGE, gate_status, has_leaked, say
from closewait_guard.commands._parser import add_answer_options, add_json, seconds, settings_of
from closewait_guard.commands.scan import pid

if TYPE_CHECKING:
    from closewait_guard._processes import ProcessScanner
    from closewait_guard._render import LastReport
    from closewait_guard.model import Report

_USAGE = "closewait-guard report [options] [PID ...]"
_DESCRIPTION = """\
Ask running processes for their full report now, each from a thread of its own:
also while the main thread is stuck. They were started by `closewait-guard run`,
or call install(control=True). Those of one program are printed as one. Linux."""
_EPILOG = """\
exit status: 0 printed, 2 error; with --fail-on-leak 1 leaks, 87 unknown
example:     closewait-guard report --name gunicorn --tree"""
_TIMEOUT = 10.0
# Each waits most of the time.
_MAX_THREADS = 16


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.usage, parser.description, parser.epilog = _USAGE, _DESCRIPTION, _EPILOG
    parser.add_argument("pids", nargs="*", type=pid, metavar="PID", help="process to ask")
    parser.add_argument("--tree", action="store_true", help="ask child processes too")
    parser.add_argument("--name", metavar="NAME", help="ask all processes of this program")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=_TIMEOUT,
        metavar="SECONDS",
        help=f"time to wait for each answer (default: {_TIMEOUT:g})",
    )
    what = parser.add_mutually_exclusive_group()
    add_json(what)
    what.add_argument(
        "--start",
        type=seconds,
        metavar="SECONDS",
        help="have them print a report to stderr every SECONDS",
    )
    what.add_argument("--stop", action="store_true", help="end what --start began")
    add_answer_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Ask, and print."""
    from closewait_guard._format import pluralize
    from closewait_guard._processes import ProcessScanner
    from closewait_guard._render import from_dict
    from closewait_guard._stream import print_error
    from closewait_guard.commands._reports import ReportFiles, parts_of, programs_of
    from closewait_guard.exceptions import ConfigurationError

    scanner = ProcessScanner(settings_of(arguments))
    files = ReportFiles(arguments)
    if files and (arguments.start or arguments.stop):
        raise ConfigurationError("report: --html and --collapsed need a report to write")
    answers, failures = _ask_all(_pids_of(arguments, scanner), arguments)
    for failure in failures:
        print_error(failure)
    if arguments.start or arguments.stop:
        for number in answers:
            say(f"Process {number} {_what_it_does(arguments)}.")
        return USAGE if failures else FINE
    # Also before it is passed on as JSON: it is another program's text.
    reports = [from_dict(answer.get("report", {})) for answer in answers.values()]
    programs = programs_of(reports) if reports else []
    if arguments.json:
        _print_json(reports)
    else:
        _print_programs(programs, arguments, is_complete=not failures)
    left_out = 0 if arguments.tree else _count_left_out(answers, scanner)
    if left_out and not arguments.json:
        say(f"Not asked: {pluralize(left_out, 'child process')} (add --tree).")
    if programs:
        files.write(parts_of(programs, is_complete=not failures), failures)
    if arguments.fail_on_leak:
        has_leaks = any(map(has_leaked, reports))
        return gate_status(
            reports, has_leaks=has_leaks, is_complete=not failures, left_out=left_out
        )
    return USAGE if failures else FINE


def _pids_of(arguments: argparse.Namespace, scanner: ProcessScanner) -> dict[int, bool]:
    """The processes to ask, each with whether it is one of those that were named."""
    from closewait_guard._remote import pids_named
    from closewait_guard.exceptions import ConfigurationError

    if not arguments.pids and arguments.name is None:
        raise ConfigurationError("report: missing PID (or use --name NAME)")
    named = [] if arguments.name is None else sorted(pids_named(arguments.name))
    if arguments.name is not None and not named:
        raise ConfigurationError(f"no process of a program named {arguments.name!r} is running")
    wanted = dict.fromkeys((*arguments.pids, *named), True)
    if not arguments.tree:
        return wanted
    return dict.fromkeys(scanner.with_descendants(list(wanted)), False) | wanted


def _request_of(arguments: argparse.Namespace) -> dict[str, object]:
    if arguments.start:
        return {"request": "start", "interval": arguments.start}
    return {"request": "stop" if arguments.stop else "report"}


def _what_it_does(arguments: argparse.Namespace) -> str:
    if arguments.stop:
        return "prints no more reports at intervals"
    return f"prints a report to its stderr every {arguments.start:g} s"


def _ask_all(
    pids: dict[int, bool], arguments: argparse.Namespace
) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The answers by process; and a sentence for each that has not answered."""
    from concurrent.futures import ThreadPoolExecutor

    from closewait_guard._remote import RemoteError, ask_control, may_leak

    request = _request_of(arguments)

    def ask(number: int) -> dict[str, Any] | str:
        try:
            return ask_control(number, request, arguments.timeout)
        except RemoteError as error:
            # Children that are not Python have nothing to say.
            return str(error) if pids[number] or may_leak(number) else ""

    with ThreadPoolExecutor(_MAX_THREADS) as pool:
        found = dict(zip(pids, pool.map(ask, pids), strict=True))
    answers = {number: answer for number, answer in found.items() if isinstance(answer, dict)}
    return answers, [answer for answer in found.values() if isinstance(answer, str) and answer]


def _print_programs(
    programs: Sequence[Sequence[LastReport]], arguments: argparse.Namespace, *, is_complete: bool
) -> None:
    from closewait_guard._stream import layout_of
    from closewait_guard.commands._reports import print_programs

    layout = layout_of(sys.stdout, everything=arguments.verbose, verbose=arguments.verbose)
    print_programs(programs, layout, is_complete=is_complete)


def _print_json(reports: Iterable[Report]) -> None:
    from closewait_guard._render import to_dict

    for report in reports:
        say(json.dumps(to_dict(report)))


def _count_left_out(answers: Iterable[int], scanner: ProcessScanner) -> int:
    """How many Python processes are below those that have answered, each for itself only."""
    from closewait_guard._remote import may_leak

    left_out = set(scanner.with_descendants(list(answers))).difference(answers)
    return sum(map(may_leak, left_out))
