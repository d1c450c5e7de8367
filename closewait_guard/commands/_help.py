"""The commands in a line each, and the help text that lists them."""

from __future__ import annotations

import os

__all__ = ["COMMANDS", "DESCRIPTION", "EPILOG", "completing"]

COMMANDS = {
    "run": "run a program under the guard, without touching its code",
    "scan": "look at processes from outside: who leaks, since when",
    "watch": "the same, live",
    "show": "tell saved reports, or what has changed between two",
    "demo": "leak sockets in the classic ways, and tell them",
    "doctor": "what the guard can and cannot see on this machine",
    "completion": "print the completion script of a shell",
}
DESCRIPTION = "Finds leaked sockets: which, since when, born where, and what to change."
EPILOG = """\
exit codes: 0 fine, 1 leaks found, 2 usage or nothing to look at,
by `run --fail-on-leak` 86 leaks found, 87 unknown whether there are;
`run` passes on those of its program

example:  closewait-guard scan --state CLOSE_WAIT"""


def completing() -> bool:
    """Whether it is the shell that asks, how a command line may go on."""
    return "_ARGCOMPLETE" in os.environ
