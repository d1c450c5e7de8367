"""`attach`: one report from inside a running process that was started without a guard."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from closewait_guard.commands._output import FINE, USAGE, gate_status, has_leaked, say
from closewait_guard.commands._parser import add_answer_options, add_json, seconds, settings_of
from closewait_guard.commands.scan import pid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from closewait_guard._remote import Answer

_DESCRIPTION = """\
Ask a running Python process, started with or without closewait-guard, for a
report from inside: what holds each leak, and its line if a guard is in there.
It goes on as before. Linux; Python 3.11 to 3.13 needs gdb."""
_EPILOG = """\
exit status: 0 printed, 2 usage error or no report; with --fail-on-leak 1 leaks,
             87 unknown
example:     closewait-guard attach 4242 --tree
"""
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
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("pid", type=pid, metavar="PID", help="process to ask")
    parser.add_argument("--tree", action="store_true", help="ask the Python processes below it too")
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Ask, and print."""
    from closewait_guard._remote import ask, find_targets
    from closewait_guard._stream import print_error

    settings = settings_of(arguments).describe()
    thresholds = {name: settings[name] for name in _THRESHOLDS}
    found = find_targets(arguments.pid, tree=arguments.tree)
    answers, failures = ask(found.targets, arguments.method, arguments.timeout, thresholds)
    for failure in (*found.failures, *failures):
        print_error(failure)
    if not answers:
        return USAGE
    is_complete = not (found.failures or failures)
    _print_answers(answers, arguments, is_complete=is_complete)
    if arguments.fail_on_leak:
        reports = [each.report for each in answers]
        has_leaks = any(map(has_leaked, reports))
        return gate_status(reports, has_leaks=has_leaks, is_complete=is_complete)
    return FINE if is_complete else USAGE


def _print_answers(
    answers: Sequence[Answer], arguments: argparse.Namespace, *, is_complete: bool
) -> None:
    from closewait_guard._format import pluralize
    from closewait_guard._render import LastReport, render_family, to_dict
    from closewait_guard._stream import layout_of, write_if_possible

    asked = "".join(f"{_manner(each)}\n" for each in answers)
    if arguments.json:
        for each in answers:
            say(json.dumps(to_dict(each.report)))
        write_if_possible(asked)
        return
    layout = layout_of(sys.stdout, everything=arguments.verbose, verbose=arguments.verbose)
    members = [LastReport(each.report) for each in answers]
    say(render_family(members, layout, is_complete=is_complete))
    if arguments.tree:
        say(f"Asked {pluralize(len(answers), 'Python process')}.")
    say(asked, end="")


def _manner(answer: Answer) -> str:
    """What it has cost the process."""
    if answer.seconds is None:
        return f"Process {answer.pid} has answered through its control socket."
    stopped = f"stopped for {answer.pause * 1000:.0f} ms by gdb" if answer.pause else "not stopped"
    text = (
        f"Process {answer.pid} was {stopped}; the scan took {answer.seconds:.2f} s, "
        "beside its own threads."
    )
    if answer.reached_limit is not None:
        text += f"\nIts limit is {answer.reached_limit:,} descriptors; it had more for the scan."
    return text
