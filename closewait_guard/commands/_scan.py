"""`scan`: look at processes from outside, once."""

from __future__ import annotations

import argparse
import gc
import time
from typing import TYPE_CHECKING

from closewait_guard.commands._codes import FINE, LEAKS_FOUND, USAGE
from closewait_guard.commands._configuration import add_no_config, settings_of
from closewait_guard.commands._output import say
from closewait_guard.commands._targets import add_targets, complain, pids_of, state

if TYPE_CHECKING:
    from closewait_guard._outside import Found, Glance, Onlooker

_DESCRIPTION = """\
Looks at processes from outside, guarded or not: their sockets by program and
peer, how long the peers have been gone, bytes left unread, share of the limit
on descriptors, and the verdict. Without PID, tells every process that leaks."""
_EPILOG = """\
exit codes: 0 no leak, 1 leaks found, 2 usage or no such process
example:    closewait-guard scan 4242 --tree"""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add_targets(parser)
    parser.add_argument("--all", action="store_true", help="tell healthy sockets, too")
    parser.add_argument(
        "--state",
        action="append",
        type=state,
        metavar="S",
        help="only sockets in this TCP state, such as CLOSE_WAIT; may be given again",
    )
    parser.add_argument(
        "--json", action="store_true", help="one document a line, one line a process"
    )
    add_no_config(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Look, and tell."""
    from closewait_guard._outside import Onlooker, told, told_missing
    from closewait_guard._stream import put_if_possible

    # Nothing that is made here is garbage before the end: to look for any is a third of the time.
    gc.disable()
    settings = settings_of(arguments)
    onlooker = Onlooker(settings)
    pids = pids_of(arguments, onlooker)
    found = _looked(onlooker, pids, settings.grace, everything=arguments.all or arguments.state)
    chosen = _chosen(found, arguments)
    missed = complain(found, arguments.pids)
    # Of those that were asked for, each has been complained of.
    found = found._replace(refused=[] if arguments.pids else found.refused)
    if arguments.json:
        _print_json(chosen)
        if missing := told_missing(found):
            put_if_possible(f"{missing}\n")
    elif chosen or found.strays or not arguments.pids:
        say(told(found, only=chosen), end="")
    if any(glance.report.accused for glance in chosen):
        return LEAKS_FOUND
    return USAGE if missed else FINE


def _looked(onlooker: Onlooker, pids: list[int] | None, grace: float, *, everything: bool) -> Found:
    """A second look, where nobody has dated an end, tells whether the grace time is over."""
    found = onlooker.look(pids, everything=everything)
    if found.undated:
        time.sleep(grace)
        found = onlooker.look(pids, everything=everything)
    return found


def _chosen(found: Found, arguments: argparse.Namespace) -> list[Glance]:
    """Who was asked for; of all, those who leak."""
    glances = list(found.glances)
    if arguments.state:
        glances = [glance.only(set(arguments.state)) for glance in glances]
        return [each for each in glances if each.report.leaks or each.report.observations]
    if arguments.pids:
        return glances
    if arguments.all:
        return [glance for glance in glances if glance.report.open_sockets]
    return [glance for glance in glances if glance.report.leaks]


def _print_json(glances: list[Glance]) -> None:
    import json

    from closewait_guard._serial import to_dict

    for glance in glances:
        say(json.dumps(to_dict(glance.report)))
