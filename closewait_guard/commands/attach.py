"""`attach`: a report from inside a running process that was started without a guard."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

from closewait_guard.commands._output import FINE, USAGE, gate_status, has_leaked, say
from closewait_guard.commands._parser import (
    add_answer_options,
    add_json,
    checked_reporter,
    seconds,
    settings_of,
)
from closewait_guard.commands.scan import pid

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from closewait_guard._format import Layout
    from closewait_guard._remote import Answer, Reached
    from closewait_guard._render import LastReport
    from closewait_guard.settings import Settings

_USAGE = "closewait-guard attach [options] PID"
_DESCRIPTION = """\
Ask a running Python process, started with or without closewait-guard, for a
report from inside: what holds each leak, and its line if a guard is in there.
It goes on as before. Linux; Python 3.11 to 3.13 needs gdb."""
_EPILOG = """\
exit status: 0 printed, 2 error; with --fail-on-leak 1 leaks, 87 unknown
example:     closewait-guard attach 4242 --tree --watch 60"""
# What a program without a guard is judged by, as the other commands judge.
_THRESHOLDS = (
    "grace",
    "half_close_idle",
    "count_warning",
    "fd_share_critical",
    "age_warning",
    "age_critical",
    "checkout_grace",
    "fd_used_critical",
)
# An idle worker of gunicorn waits for 15.
_TIMEOUT = 30.0


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.usage, parser.description, parser.epilog = _USAGE, _DESCRIPTION, _EPILOG
    parser.add_argument("pid", type=pid, metavar="PID", help=argparse.SUPPRESS)
    parser.add_argument("--tree", action="store_true", help="the Python processes below PID too")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--watch",
        type=seconds,
        metavar="SECONDS",
        help="leave a guard in for SECONDS, then report",
    )
    what.add_argument(
        "--install",
        action="store_true",
        help="leave a guard in; --interval SECONDS, --report NAME",
    )
    what.add_argument(
        "--uninstall", action="store_true", help="take out what --install has left in"
    )
    parser.add_argument("--interval", type=seconds, help=argparse.SUPPRESS)
    parser.add_argument("--report", action="append", help=argparse.SUPPRESS)
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=_TIMEOUT,
        metavar="SECONDS",
        help=f"wait for its main thread (default: {_TIMEOUT:g})",
    )
    parser.add_argument(
        "--method",
        choices=("auto", "remote-exec", "gdb"),
        default="auto",
        metavar="HOW",
        help="auto, remote-exec (Python 3.14+) or gdb",
    )
    add_json(parser)
    add_answer_options(parser)
    parser.set_defaults(run=lambda arguments: run(arguments, parser))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Ask, and print."""
    if (arguments.interval or arguments.report) and not arguments.install:
        parser.error("--interval and --report need --install")
    if (arguments.html or arguments.collapsed) and (arguments.install or arguments.uninstall):
        parser.error("--html and --collapsed need a report to write")
    settings = settings_of(arguments)
    if arguments.install:
        return _install(arguments, settings)
    return _uninstall(arguments) if arguments.uninstall else _ask(arguments, settings)


def _ask(arguments: argparse.Namespace, settings: Settings) -> int:
    from closewait_guard._remote import ask, find_targets, pythons_below, watch_processes
    from closewait_guard._render import LastReport
    from closewait_guard._stream import print_error
    from closewait_guard.commands._reports import ReportFiles, parts_of

    files = ReportFiles(arguments)
    found = find_targets(arguments.pid, tree=arguments.tree)
    asked = found.targets, arguments.method, arguments.timeout, _thresholds(settings)
    before = pythons_below(arguments.pid)
    if arguments.watch is None:
        answers, failures = ask(*asked)
    else:
        announce = partial(_announce, arguments.watch)
        answers, failures = watch_processes(*asked, arguments.watch, announce)
        if arguments.tree and (later := pythons_below(arguments.pid) - before):
            failures.append(_not_watched(later))
    failures = [*found.failures, *failures]
    for failure in failures:
        print_error(failure)
    if not answers:
        return USAGE
    is_complete = not failures
    members = [LastReport(each.report) for each in answers]
    left_out = 0 if arguments.tree else len(before & pythons_below(arguments.pid))
    _print_answers(answers, members, arguments, is_complete=is_complete, left_out=left_out)
    files.write(parts_of([members], is_complete=is_complete), failures)
    if arguments.fail_on_leak:
        reports = [each.report for each in answers]
        has_leaks = any(map(has_leaked, reports))
        return gate_status(reports, has_leaks=has_leaks, is_complete=is_complete, left_out=left_out)
    return FINE if is_complete else USAGE


def _not_watched(pids: Collection[int]) -> str:
    from closewait_guard._format import pluralize

    named = ", ".join(map(str, sorted(pids)[:5]))
    return f"not watched: {pluralize(len(pids), 'process')} that began meanwhile ({named})"


def _thresholds(settings: Settings) -> dict[str, object]:
    known = settings.describe()
    return {name: known[name] for name in _THRESHOLDS}


def _announce(duration: float, number: int) -> None:
    from closewait_guard._format import pluralize
    from closewait_guard._stream import write_if_possible

    what = pluralize(number, "process")
    write_if_possible(f"Watching {what} for {duration:g} s (Ctrl-C ends it early).\n")


def _print_answers(
    answers: Sequence[Answer],
    members: Sequence[LastReport],
    arguments: argparse.Namespace,
    *,
    is_complete: bool,
    left_out: int,
) -> None:
    from closewait_guard._format import pluralize
    from closewait_guard._render import render_family, to_dict
    from closewait_guard._stream import layout_of, write_if_possible

    asked = "".join(f"{_manner(each)}\n" for each in answers)
    if left_out:
        asked += f"Not asked: {pluralize(left_out, 'child process')} (add --tree).\n"
    if arguments.json:
        for each in answers:
            say(json.dumps(to_dict(each.report)))
        write_if_possible(asked)
        return
    layout = layout_of(sys.stdout, everything=arguments.verbose, verbose=arguments.verbose)
    say(render_family(members, layout, is_complete=is_complete))
    _print_growth(answers, layout)
    if arguments.tree:
        say(f"Asked {pluralize(len(answers), 'Python process')}.")
    say(asked, end="")


def _print_growth(answers: Sequence[Answer], layout: Layout) -> None:
    """Of a watch, what has changed since the first scan."""
    from closewait_guard._format import format_duration
    from closewait_guard._render import difference, sum_reports

    pairs = [(each.first, each.report) for each in answers if each.first is not None]
    if not pairs:
        return
    first, last = sum_reports([one for one, _ in pairs]), sum_reports([two for _, two in pairs])
    say(f"Since the first scan, {format_duration(last.taken_at - first.taken_at)} before:")
    say("\n".join(takewhile(bool, difference(first, last, layout))), end="\n\n")


def _manner(answer: Answer) -> str:
    """How a process was asked, and what that has cost it."""
    process = answer.process
    name, is_watch = f"Process {process.pid}", answer.first is not None
    if is_watch and process.had_guard:
        return f"{name} has a guard already: it was asked twice, and no other was put in."
    if process.seconds is None:
        return f"{name} has answered through its control socket."
    text = f"{name} was {_stopped(process)}; the scan took {process.seconds:.2f} s, "
    text += "beside its own threads."
    if is_watch:
        text += " The guard is out again."
    if process.reached_limit is not None:
        text += f"\nIts limit is {process.reached_limit:,} descriptors; it had more for the scan."
    return text


def _stopped(process: Reached) -> str:
    return f"stopped for {process.pause * 1000:.0f} ms by gdb" if process.pause else "not stopped"


def _install(arguments: argparse.Namespace, settings: Settings) -> int:
    reporters = [
        checked_reporter("attach --report", name, is_made_here=False)
        for name in arguments.report or ()
    ]
    if arguments.interval is not None and not reporters:
        reporters = ["text"]
    interval = arguments.interval or settings.interval
    given = _thresholds(settings) | {"interval": interval, "at_exit": False}
    done, failed = _change(
        arguments, {"what": "install", "settings": given, "reporters": reporters}
    )
    new = [each for each in done if not each.had_guard]
    for each in done:
        if each.had_guard:
            say(f"Process {each.pid} has a guard already, which stays as it is.")
    if new:
        _print_installed(new, arguments)
    for name in reporters if new else ():
        where = "the program's stderr" if name == "text" else name
        say(f"Reports every {interval:g} s to {where}.")
    return USAGE if failed else FINE


def _print_installed(new: Sequence[Reached], arguments: argparse.Namespace) -> None:
    for each in new:
        say(f"Process {each.pid} was {_stopped(each)}, and has a guard now.")
    target = f"{arguments.pid} --tree" if arguments.tree else f"{arguments.pid}"
    say("It knows the line of each socket that is opened from now on.")
    say(f"Ask for a report:  closewait-guard report {target}")
    say(f"Take it out:       closewait-guard attach {target} --uninstall")


def _uninstall(arguments: argparse.Namespace) -> int:
    done, failed = _change(arguments, {"what": "uninstall"})
    for each in done:
        say(f"Process {each.pid} was {_stopped(each)}, and has no guard any more.")
    return USAGE if failed else FINE


def _change(
    arguments: argparse.Namespace, order: Mapping[str, object]
) -> tuple[list[Reached], bool]:
    """Those in which it is done; and whether it is not done in some."""
    from closewait_guard._remote import change, find_targets
    from closewait_guard._stream import print_error

    found = find_targets(arguments.pid, tree=arguments.tree)
    done, failures = change(found.targets, arguments.method, arguments.timeout, order)
    for failure in (*found.failures, *failures):
        print_error(failure)
    return done, bool(found.failures or failures)
