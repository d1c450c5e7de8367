"""The parser of the command line; of a command that is not called it knows only the name."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from closewait_guard.commands._output import COMMANDS, USAGE, help_text, say

__all__ = [
    "is_completing",
    "parse_arguments",
]


def is_completing() -> bool:
    """Whether it is the shell that asks, how a command line may go on."""
    return "_ARGCOMPLETE" in os.environ


def parse_arguments(given: list[str]) -> argparse.Namespace:
    """The arguments as they are meant; exits with 2 on an error, and with the help if none."""
    if is_completing():
        from closewait_guard.commands.completion import complete

        complete(_parser(COMMANDS))
    target: list[str] = []
    parser = _parser(given[:1])
    if not given:
        parser.exit(USAGE, parser.format_help())
    if given[0] not in COMMANDS:
        # Neither a command nor an option stands first: argparse would only list what may.
        known = _options(parser) if given[0].startswith("-") else COMMANDS
        if given[0] not in known:
            parser.error(_unknown(given[0], known))
    if given[0] == "run":
        from closewait_guard.commands.run import split

        given, target = split(given)
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        command = parser.commands[arguments.command]
        command.error(_unknown(unknown[0], _options(command)))
    arguments.target = target
    return arguments


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", parser.format_help())


def _unknown(word: str, known: Iterable[str]) -> str:
    from closewait_guard._config import did_you_mean, shown, unknown_name

    if not word.startswith("-"):
        if known is COMMANDS:
            return unknown_name("command", word, known, "Commands")
        return f"unexpected argument {shown(word)}"
    option = word.partition("=")[0]
    near = did_you_mean(option, known)
    return f"unknown option {shown(option)}{near and f'.{near}'}"


def _parser(wanted: Iterable[str]) -> _TopParser:
    """The parser; only the wanted commands know their own arguments."""
    parser = _TopParser(
        prog="closewait-guard",
        usage="%(prog)s [-h] [-V] COMMAND ...",
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(
        prog="closewait-guard",
        metavar="COMMAND",
        required=True,
        dest="command",
        parser_class=_Parser,
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
        parser.commands[name] = command
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


class _TopParser(_Parser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands: dict[str, argparse.ArgumentParser] = {}

    def format_help(self) -> str:
        return help_text()


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        say(f"closewait-guard {version('closewait_guard')}")
        parser.exit()
