"""Print what commands print, survive that it cannot be printed; the top help, the exit codes.

All that `--help` needs: even argparse would take as long to load as all the rest.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TextIO

    from closewait_guard.model import Report

__all__ = [
    "COMMANDS",
    "FAILED_ON_LEAK",
    "FINE",
    "LEAKS_FOUND",
    "NO_VERDICT",
    "USAGE",
    "OutputError",
    "discard_lost_errors",
    "discard_output",
    "flush_output",
    "gate_status",
    "has_leaked",
    "help_text",
    "prepare_streams",
    "say",
]


COMMANDS = {
    "run": "run a program with leak tracking, no code changes needed",
    "scan": "check running processes from outside for leaked sockets",
    "watch": "like scan, refreshed live",
    "attach": "ask a running Python process for one report from inside",
    "report": "ask guarded processes for their full report now",
    "show": "print saved reports, or compare two",
    "demo": "leak sockets on purpose and show the report",
    "doctor": "show what can and cannot be tracked on this machine",
    "completion": "print a shell completion script",
}


def help_text() -> str:
    """What `--help` without a command prints."""
    commands = "\n".join(f"  {name:<11} {text}" for name, text in COMMANDS.items())
    return f"""\
usage: closewait-guard [-h] [-V] COMMAND ...

Find leaked sockets: where they were opened, what holds them, and how to fix it.

commands (each has its own --help):
{commands}

options:
  -h, --help     show this help message and exit
  -V, --version  print the version

Exit status: 0 no leaks, 1 leaks found, 2 usage error or nothing to scan; `run`
returns that of the program, with --fail-on-leak 86 if it leaked, 87 if unknown.

Service leaking right now?  closewait-guard scan; closewait-guard attach PID
Then restart it under:      closewait-guard run --interval 60 -- uvicorn app:app
"""


class OutputError(OSError):
    """Standard output takes nothing any more, for another reason than that its reader has gone."""

    def __str__(self) -> str:
        return f"standard output cannot be written to: {self.strerror}"


def prepare_streams() -> None:
    """Text of any letters can be printed; what was closed at the start is not silently ignored."""
    if sys.stdout is None:
        # Opened for reading only, so that whatever is written to it fails as on any bad output.
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if sys.stderr is None:
        # Otherwise print() writes to standard output what is meant for standard error.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, end: str = "\n", *, flush: bool = False) -> None:
    """Print to standard output.

    Raises:
        BrokenPipeError: Its reader has gone.
        OutputError: It cannot be written to for another reason.
    """
    try:
        print(text, end=end, flush=flush)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from error


def flush_output() -> None:
    """Print all that waits, while a failure can still be noticed."""
    say("", end="", flush=True)


def discard_output() -> None:
    """What is left in the buffer has no reader, and would be complained of at exit."""
    _discard(sys.stdout)


def discard_lost_errors() -> None:
    """What cannot be written to standard error must not change the exit code."""
    try:
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


FINE = 0
LEAKS_FOUND = 1
USAGE = 2
FAILED_ON_LEAK = 86
NO_VERDICT = 87


def has_leaked(report: Report) -> bool:
    """Whether there are leaks: in a report, left out of it, or dropped without a record."""
    return bool(report.leaks or report.omitted or report.coverage.forgotten)


def gate_status(
    reports: Iterable[Report], *, has_leaks: bool, is_complete: bool, left_out: int = 0
) -> int:
    """What `--fail-on-leak` makes of reports, having said why leaks may be missing from them.

    Args:
        reports: What there is.
        has_leaks: Whether they have leaks that count.
        is_complete: Whether no report is missing of those that were asked for.
        left_out: How many Python processes below these were not asked.
    """
    from closewait_guard._format import pluralize, unique
    from closewait_guard._stream import print_error

    unknown = unique(
        f"leaks unknown: process {report.pid}: {why}"
        for report in reports
        for why in report.coverage.leaks_unknown
    )
    if left_out:
        children = pluralize(left_out, "child process")
        unknown.append(f"leaks unknown: not asked: {children} (add --tree)")
    for sentence in unknown:
        print_error(sentence)
    if has_leaks:
        return LEAKS_FOUND
    if not is_complete:
        return USAGE
    return NO_VERDICT if unknown else FINE
