"""`scan`: look at processes from outside, once; and the arguments that `watch` shares with it."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from typing import TYPE_CHECKING

from closewait_guard.commands._output import FINE, LEAKS_FOUND, USAGE, flush_output, say
from closewait_guard.commands._parser import add_json, add_no_config, settings_of

if TYPE_CHECKING:
    from closewait_guard._processes import ProcessReport, ProcessScan, ProcessScanner

__all__ = [
    "add_targets",
    "pid",
    "pids_of",
    "print_inaccessible",
    "state",
]


def add_targets(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which processes to look at."""
    pids = parser.add_argument(
        "pids", nargs="*", type=pid, metavar="PID", help="process to inspect (default: all)"
    )
    pids.completer = _numbers  # type: ignore[attr-defined]
    parser.add_argument("--tree", action="store_true", help="include child processes")


def pid(text: str) -> int:
    """The number of a process, as it is typed."""
    from closewait_guard._config import shown, whole_number_parser

    try:
        return whole_number_parser("", lambda number: 0 < number < 1 << 31)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid PID {shown(text)}") from None


def _numbers(**_: object) -> list[str]:
    """For the shell's completion."""
    from pathlib import Path

    try:
        return [path.name for path in Path("/proc").iterdir() if path.name.isdecimal()]
    except OSError:
        return []


def state(text: str) -> str:
    """A TCP state by any of its usual spellings: CLOSE_WAIT, close-wait, Close-Wait."""
    from closewait_guard._config import unknown_name
    from closewait_guard.model import State

    name = text.upper().replace("-", "_")
    name = {"SYN_SENT1": "SYN_SENT", "CLOSED": "CLOSE", "ESTAB": "ESTABLISHED"}.get(name, name)
    known = [each.value for each in State if each.value.isupper()]
    if name not in known:
        raise argparse.ArgumentTypeError(unknown_name("TCP state", text, known, "States"))
    return name


def pids_of(arguments: argparse.Namespace, scanner: ProcessScanner) -> list[int] | None:
    """The processes to look at; None for all."""
    from closewait_guard.exceptions import ConfigurationError

    if not arguments.pids:
        if arguments.tree:
            raise ConfigurationError("--tree needs a PID")
        return None
    pids: list[int] = arguments.pids
    return scanner.with_descendants(pids) if arguments.tree else pids


def print_inaccessible(found: ProcessScan, asked: list[int]) -> bool:
    """Say which of the processes asked for cannot be looked at; whether there are any."""
    from closewait_guard._processes import how_to_be_permitted, user
    from closewait_guard._stream import print_error

    missed = [each for each in found.inaccessible if each.pid in asked]
    for each in missed:
        program = f" ({each.program})" if each.program else ""
        if each.why:
            text = f"process {each.pid}{program} {each.why}"
        elif each.exists:
            who = f"{each.pid}{program} of user {user(each.uid)}"
            text = f"not permitted to inspect process {who}: {how_to_be_permitted()}"
        else:
            text = f"no such process: {each.pid}"
        print_error(text)
    return bool(missed)


_DESCRIPTION = """\
Inspect processes from outside, with or without closewait-guard in them: sockets
by program and peer, how long ago the peer closed, unread bytes, descriptor
usage, and a verdict. Without a PID, list every process with leaks."""
_EPILOG = """\
exit status: 0 no leaks, or only what an idle pool may hold (idle or leaked),
             1 leaks found, 2 usage error or no such process
example:     closewait-guard scan 4242 --tree
"""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add_targets(parser)
    parser.add_argument("--all", action="store_true", help="include healthy sockets")
    parser.add_argument(
        "--state",
        action="append",
        type=state,
        metavar="S",
        help="only sockets in this TCP state, e.g. CLOSE_WAIT (repeatable)",
    )
    add_json(parser)
    add_no_config(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Scan, and print."""
    from closewait_guard._processes import ProcessScanner, render_inaccessible, render_processes
    from closewait_guard._stream import write_if_possible

    # Nothing that is made here is garbage before the end: to look for any is a third of the time.
    gc.disable()
    settings = settings_of(arguments)
    scanner = ProcessScanner(settings)
    pids = pids_of(arguments, scanner)
    found = _scan_twice_if_undated(
        scanner, pids, settings.grace, everything=arguments.all or arguments.state
    )
    chosen = _choose(found, arguments)
    missed = print_inaccessible(found, arguments.pids)
    # Of those that were asked for, each has been complained of; not of their descendants.
    found = found._replace(
        inaccessible=[each for each in found.inaccessible if each.pid not in arguments.pids]
    )
    children = _children_left_out(arguments, scanner)
    if arguments.json:
        _print_json(chosen)
        # What comes after a failure to print would be no answer.
        flush_output()
        write_if_possible(
            "".join(f"{text}\n" for text in (render_inaccessible(found), children) if text)
        )
    elif chosen or found.unowned or not arguments.pids:
        from closewait_guard._stream import layout_of

        layout = layout_of(sys.stdout, everything=bool(arguments.all or arguments.state))
        say(render_processes(found, only=chosen, layout=layout), end="")
        if children:
            say(children)
    if any(finding.is_leak for process in chosen for finding in process.report.findings):
        return LEAKS_FOUND
    return USAGE if missed else FINE


def _children_left_out(arguments: argparse.Namespace, scanner: ProcessScanner) -> str:
    """That a master answers for itself only; empty where it has no children."""
    from closewait_guard._format import pluralize

    if arguments.tree or not arguments.pids:
        return ""
    left_out = set(scanner.with_descendants(arguments.pids)) - set(arguments.pids)
    many = pluralize(len(left_out), "child process")
    return f"Not scanned: {many} (add --tree)." if left_out else ""


def _scan_twice_if_undated(
    scanner: ProcessScanner, pids: list[int] | None, grace: float, *, everything: bool
) -> ProcessScan:
    """A second scan, where an end has no date, shows whether the grace time is over."""
    found = scanner.scan(pids, everything=everything)
    if found.has_undated:
        time.sleep(grace)
        found = scanner.scan(pids, everything=everything)
    return found


def _choose(found: ProcessScan, arguments: argparse.Namespace) -> list[ProcessReport]:
    """Who was asked for; of all, those who leak, or have too many closing sockets."""
    from closewait_guard._render import is_quiet

    processes = list(found.processes)
    if arguments.state:
        processes = [process.in_states(set(arguments.state)) for process in processes]
        return [each for each in processes if each.report.findings or each.report.observations]
    if arguments.pids:
        return processes
    if arguments.all:
        return [process for process in processes if process.report.open_sockets]
    return [
        process
        for process in processes
        if any(not is_quiet(each.verdict, each.severity) for each in process.report.findings)
    ]


def _print_json(processes: list[ProcessReport]) -> None:
    import json

    from closewait_guard._render import to_dict

    for process in processes:
        say(json.dumps(to_dict(process.report)))
