"""Print what commands print, survive that it cannot be printed, and the exit codes."""

from __future__ import annotations

import os
import sys
from typing import TextIO

__all__ = [
    "FAILED_ON_LEAK",
    "FINE",
    "LEAKS_FOUND",
    "NO_VERDICT",
    "USAGE",
    "OutputError",
    "discard_lost_errors",
    "discard_output",
    "flush_output",
    "prepare_streams",
    "say",
]


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
