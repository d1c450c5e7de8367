"""The parser of the command line, what options of several commands share, numbers of reports.

Of a command that is not called it knows only the name. The settings of a command run no code that
a file names, and say what they leave out.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from closewait_guard.commands._output import COMMANDS, USAGE, help_text, say

if TYPE_CHECKING:
    from closewait_guard.settings import Settings

__all__ = [
    "Selection",
    "add_answer_options",
    "add_files",
    "add_json",
    "add_metrics",
    "add_no_config",
    "checked_reporter",
    "is_completing",
    "number",
    "parse_argument",
    "parse_arguments",
    "seconds",
    "settings_of",
    "split",
    "variables_of",
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


def split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own options, and TARGET with all that follows: none of that is ours.

    Example:
        >>> split(["run", "--grace", "2", "app.py", "--grace", "3"])
        (['run', '--grace', '2'], ['app.py', '--grace', '3'])
        >>> split(["run", "-m", "http.server"]), split(["run", "--", "ls"])
        ((['run'], ['-m', 'http.server']), (['run'], ['ls']))
    """
    place = 1
    while place < len(given):
        word = given[place]
        if word == "--":
            return list(given[:place]), list(given[place + 1 :])
        if word == "-m" or not word.startswith("-"):
            break
        place += 1 if word in _SWITCHES or "=" in word else 2
    return list(given[:place]), list(given[place:])


_SWITCHES = frozenset(
    {"-h", "--help", "--at-exit", "--no-at-exit", "--fail-on-leak", "--no-config"}
)


_Number = TypeVar("_Number", int, float)


def parse_argument(parse: Callable[[object], _Number], text: str) -> _Number:
    """The number that was typed, or what was expected."""
    from closewait_guard._config import refusal

    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(refusal(error, text)) from None


def seconds(text: str) -> float:
    """A positive number of seconds that was typed."""
    from closewait_guard._config import interval

    return parse_argument(interval, text)


def add_json(options: argparse._ActionsContainer) -> None:
    """The option that prints the reports as data."""
    options.add_argument(
        "--json", action="store_true", help="one JSON report per line, one line per process"
    )


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """What can be asked of the reports that processes have answered with."""
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="print all calls and holders, and what is not a leak",
    )
    parser.add_argument("--fail-on-leak", action="store_true", help="exit with status 1 for leaks")
    add_files(parser)
    add_no_config(parser)


def add_metrics(parser: argparse.ArgumentParser) -> None:
    """The option that serves numbers."""
    parser.add_argument(
        "--metrics", metavar="HOST:PORT", help="serve metrics for Prometheus at this address"
    )


def add_files(options: argparse._ActionsContainer) -> None:
    """The options that write what a command has found to files, besides what it prints."""
    # One line for both: the help is to fit a screen.
    options.add_argument(
        "--html", metavar="FILE", help="also write a page; --collapsed FILE: stacks"
    )
    options.add_argument("--collapsed", metavar="FILE", help=argparse.SUPPRESS)


def add_no_config(parser: argparse.ArgumentParser) -> None:
    """The option that keeps project files out."""
    parser.add_argument("--no-config", action="store_true", help="ignore pyproject.toml")


def variables_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The option as a variable of the environment, for this process or another."""
    from closewait_guard._config import NO_CONFIG

    return {NO_CONFIG: "1"} if arguments.no_config else {}


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that count here."""
    from closewait_guard._stream import print_error
    from closewait_guard.settings import Settings

    settings = Settings.load(environ=os.environ | variables_of(arguments), code_from_file=False)
    for note in settings.notes:
        print_error(note)
    return settings


def checked_reporter(option: str, name: str, *, is_made_here: bool = True) -> str:
    """A reporter that can be made, its file under a name that holds in every directory.

    Args:
        option: What has named it.
        name: Its name.
        is_made_here: As the user that it will be made as, so that its file may be opened.

    Raises:
        ConfigurationError: It cannot be made.
    """
    from pathlib import Path

    from closewait_guard._stream import close_reporter
    from closewait_guard.exceptions import ConfigurationError
    from closewait_guard.reporters import named

    found = _WITH_PATH.fullmatch(name)
    whole = found[1] + str(Path(found[2]).absolute()) if found else name
    try:
        close_reporter(named(whole if is_made_here or not found else f"{found[1]}/dev/stderr"))
    except ConfigurationError as error:
        raise ConfigurationError(f"{option}: {error}") from None
    return whole


_WITH_PATH = re.compile("(.*?json_lines:(?:examples=[^:]*:)?)(.+)", re.DOTALL)


class Selection:
    """`3`, `-1`, `2:5`, `-3:` as places in a sequence: from 1, or from the end, ends included."""

    def __init__(self, text: str) -> None:
        self._text = text
        first, colon, last = text.partition(":")
        self._first = number(first or "1", "--range")
        self._last = number(last or "-1", "--range") if colon else self._first

    def of(self, many: int, where: str) -> range:
        """The places, from 0, in so many."""
        first, last = _place(self._first, many), _place(self._last, many)
        chosen = range(max(first, 0), min(last, many - 1) + 1)
        if not chosen:
            from closewait_guard._format import pluralize
            from closewait_guard.exceptions import ReportFormatError

            raise ReportFormatError(
                f"{where} has {pluralize(many, 'report')}, and none at {self._text}"
            )
        return chosen


def number(text: str, option: str) -> int:
    """A place as it is typed."""
    from closewait_guard._config import refusal, whole_number_parser

    what = "the number of a report, from 1, or from -1 backwards"
    try:
        return whole_number_parser(what, bool)(text)
    except ValueError as error:
        from closewait_guard.exceptions import ReportFormatError

        raise ReportFormatError(f"{option}: {refusal(error, text)}") from None


def _place(typed: int, many: int) -> int:
    return typed - 1 if typed > 0 else many + typed
