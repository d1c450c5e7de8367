"""The parser of the command line; of a command that is not called it knows only the name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from importlib import import_module

from closewait_guard.commands._output import say

__all__ = [
    "COMMANDS",
    "DESCRIPTION",
    "EPILOG",
    "is_completing",
    "parse_arguments",
]


COMMANDS = {
    "run": "run a program under the guard, without touching its code",
    "scan": "look at processes from outside: who leaks, since when",
    "watch": "the same, live",
    "show": "print saved reports, or what has changed between two",
    "demo": "leak sockets in the classic ways, and report them",
    "doctor": "what the guard can and cannot see on this machine",
    "completion": "print the completion script of a shell",
}
DESCRIPTION = "Finds leaked sockets: which, since when, opened where, and what to change."
EPILOG = """\
exit codes: 0 fine, 1 leaks found, 2 usage or nothing to look at,
by `run --fail-on-leak` 86 leaks found, 87 unknown whether there are;
`run` passes on those of its program

example:  closewait-guard scan --state CLOSE_WAIT"""


def is_completing() -> bool:
    """Whether it is the shell that asks, how a command line may go on."""
    return "_ARGCOMPLETE" in os.environ


def parse_arguments(given: list[str]) -> argparse.Namespace:
    """The arguments as they are meant; on an error says so, and exits with 2."""
    if is_completing():
        from closewait_guard.commands.completion import complete

        complete(_parser(COMMANDS))
    target: list[str] = []
    parser = _parser(given[:1])
    if given[:1] == ["run"]:
        from closewait_guard.commands.run import split

        given, target = split(given)
    arguments = parser.parse_args(given)
    arguments.target = target
    return arguments


def _parser(wanted: Iterable[str]) -> argparse.ArgumentParser:
    """The parser; only the wanted commands know their own arguments."""
    parser = _Parser(
        prog="closewait-guard",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(
        title="commands, of which `COMMAND --help` says more",
        metavar="COMMAND",
        required=True,
        dest="command",
    )
    for name, summary in COMMANDS.items():
        known = name in wanted
        command = commands.add_parser(
            name,
            help=summary,
            formatter_class=_formatter,
            allow_abbrev=False,
            add_help=known,
        )
        if known:
            import_module(f"closewait_guard.commands.{name}").prepare(command)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Left to itself, argparse loads half of shutil to learn the terminal's width."""
    try:
        columns = int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(1).columns
    except (OSError, ValueError):
        columns = 80
    return argparse.RawDescriptionHelpFormatter(prog, width=max(40, min(columns, 80) - 2))


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: object = None) -> None:  # noqa: ARG002
        """Left to itself, argparse ignores that a help text cannot be printed."""
        say(self.format_help(), end="")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        say(f"closewait-guard {version('closewait_guard')}")
        parser.exit()
