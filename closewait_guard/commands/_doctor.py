"""`doctor`: what the guard can and cannot see on this machine."""

from __future__ import annotations

import argparse

from closewait_guard.commands._codes import FINE
from closewait_guard.commands._configuration import add_no_config, variables_of
from closewait_guard.commands._output import say
from closewait_guard.commands._targets import pid

_DESCRIPTION = """\
Says what the guard can and cannot see here: Python, probe, limits, keepalive,
libraries that open sockets outside Python, and whoever has replaced the socket
class. With PID, which of these libraries that process has loaded."""
_EPILOG = """\
exit codes: 0 told, 2 usage or no such process
example:    closewait-guard doctor"""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "pid", nargs="?", type=pid, metavar="PID", help="a process to look into, too"
    )
    add_no_config(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Examine, and tell."""
    from closewait_guard._lines import folded
    from closewait_guard.commands._examined import findings

    # All of it first: a process that is none is told instead of everything else.
    for topic, text in list(findings(arguments.pid, variables_of(arguments))):
        say("\n".join(folded(f"{topic + ':':<13} {text}", " " * 14)))
    return FINE
