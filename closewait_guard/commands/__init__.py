"""The command line: one file for each command, imported only when it is called.

Nothing here imports what `--help` can do without: it is to answer as fast as argparse loads.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module

from closewait_guard.commands._codes import USAGE

__all__ = ["main"]

_COMMANDS = {
    "run": "run a program under the guard, without touching its code",
    "scan": "look at processes from outside: who leaks, since when",
    "watch": "the same, live",
    "show": "tell saved reports, or what has changed between two",
    "demo": "leak sockets in the classic ways, and tell them",
    "doctor": "what the guard can and cannot see on this machine",
    "completion": "print the completion script of a shell",
}
_EPILOG = """\
exit codes: 0 fine, 1 leaks found, 2 usage or nothing to look at,
86 leaks found by `run --fail-on-leak`; `run` passes on those of its program

example:  closewait-guard scan --state CLOSE_WAIT"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command; the process's exit code is what it returns."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        try:
            return _run(given)
        finally:
            # Also after a help text, and while there still is somebody who can notice.
            sys.stdout.flush()
    except BrokenPipeError:
        return _died_of("SIGPIPE")
    except KeyboardInterrupt:
        return _died_of("SIGINT")
    except Exception as error:
        from closewait_guard.exceptions import CloseWaitGuardError

        if not isinstance(error, CloseWaitGuardError):
            raise
        print(f"closewait-guard: {error}", file=sys.stderr)
        return USAGE


def _run(given: list[str]) -> int:
    completing = "_ARGCOMPLETE" in os.environ
    parser = _parser(_COMMANDS if completing else given[:1])
    if completing:
        from closewait_guard.commands._completion import complete

        complete(parser)
    target: list[str] = []
    if given[:1] == ["run"]:
        from closewait_guard.commands._run import split

        given, target = split(given)
    parsed = parser.parse_args(given)
    parsed.target = target
    code: int = parsed.run(parsed)
    return code


def _parser(wanted: Iterable[str]) -> argparse.ArgumentParser:
    """The parser; only the wanted commands know their own arguments."""
    parser = argparse.ArgumentParser(
        prog="closewait-guard",
        description="Finds leaked sockets: which, since when, born where, and what to change.",
        epilog=_EPILOG,
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for name, summary in _COMMANDS.items():
        known = name in wanted
        command = commands.add_parser(
            name,
            help=summary,
            formatter_class=_formatter,
            allow_abbrev=False,
            add_help=known,
        )
        if known:
            import_module(f"closewait_guard.commands._{name}").prepare(command)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Left to itself, argparse loads half of shutil to learn the terminal's width."""
    try:
        columns = int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(1).columns
    except (OSError, ValueError):
        columns = 80
    return argparse.RawDescriptionHelpFormatter(prog, width=max(40, min(columns, 80) - 2))


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print("closewait-guard", version("closewait_guard"))
        parser.exit()


def _died_of(name: str) -> int:
    """End as a program ends that has not caught the signal, so that shells and loops see it."""
    import signal

    number = getattr(signal, name, signal.SIGINT)
    # What is left in the buffer has no reader, and would be complained of at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if os.name == "posix":
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return 128 + int(number)
