"""What reporters share: their names, their ends, and the stream that they write text to."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from io import BufferedWriter, TextIOWrapper
from typing import TextIO, cast

from closewait_guard._format import WIDTH, Layout, escape_control
from closewait_guard.exceptions import ConfigurationError

__all__ = [
    "close_reporter",
    "flush_reporter",
    "layout_of",
    "lost_by",
    "print_error",
    "reporter_name",
    "require_stream",
    "write_if_possible",
    "write_text",
]


# Narrower lines cannot hold an address and a code; wider ones are hard to read.
_MIN_WIDTH, _MAX_WIDTH = 60, 120


def layout_of(
    stream: TextIO | None = None, *, everything: bool = False, verbose: bool = False
) -> Layout:
    """How to lay a report out: as wide as the terminal, paths relative to this directory.

    Args:
        stream: Where it goes; stderr by default.
        everything: Show a block for what is not a leak, too.
        verbose: Show all calls, threads and holders.
    """
    try:
        directory = os.getcwd()  # noqa: PTH109 - the text is all that is needed
    except OSError:
        # It has been removed.
        directory = ""
    width = _columns(stream if stream is not None else sys.stderr)
    return Layout(width, directory, everything, verbose)


def _columns(stream: TextIO | None) -> int:
    try:
        if stream is None or not stream.isatty():
            return WIDTH
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return WIDTH
    return max(_MIN_WIDTH, min(columns or WIDTH, _MAX_WIDTH))


def require_stream(reporter: str, stream: TextIO | None) -> TextIO | None:
    """Return the stream, or raise if it is none."""
    if stream is not None and not (hasattr(stream, "write") and hasattr(stream, "flush")):
        raise ConfigurationError(
            f"{reporter}: expected a stream with write() and flush(), got {stream!r}"
        )
    return stream


def write_text(stream: TextIO | None, text: str) -> None:
    """Write all at once, so that what other threads write does not come between."""
    target = stream if stream is not None else sys.stderr
    # A program without a console has no stderr.
    if target is None:
        return
    text, encoding = _encodable(text, target)
    if _is_plain(target, encoding):
        _write_through(target, text.replace("\n", os.linesep).encode(encoding))
    else:
        target.write(text)
        target.flush()


def write_if_possible(text: str) -> None:
    """Write to stderr; where that is full or closed, do nothing."""
    with suppress(OSError, ValueError):
        write_text(None, text)


def print_error(message: str) -> None:
    """Print one line on stderr, with control characters in the message escaped."""
    write_if_possible(f"closewait-guard: {escape_control(message)}\n")


def _encodable(text: str, target: TextIO) -> tuple[str, str]:
    """Escape what the stream's encoding lacks: a path may hold characters that it cannot show."""
    encoding = getattr(target, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding), encoding


def _is_plain(target: TextIO, encoding: str) -> bool:
    """Whether it is an ordinary text stream whose encoding writes no byte order mark."""
    return (
        type(target) is TextIOWrapper
        and type(target.buffer) is BufferedWriter
        and not ("".encode(encoding))
    )


def _write_through(target: TextIO, data: bytes) -> None:
    """Write past the buffer: what stays there would fail again when the interpreter exits.

    Then the program's exit code would become 120.
    """
    target.flush()
    raw = cast("BufferedWriter", target.buffer).raw
    rest = memoryview(data)
    while rest:
        written = raw.write(rest)
        if not written:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        rest = rest[written:]


def reporter_name(reporter: object) -> str:
    """The name of a reporter in a message."""
    name = getattr(reporter, "__qualname__", None)
    if isinstance(name, str):
        return name
    has_own_text = type(reporter).__repr__ is not object.__repr__
    return repr(reporter) if has_own_text else type(reporter).__qualname__


def close_reporter(reporter: object) -> None:
    """Call the reporter's `close()`, if it has one."""
    close = getattr(reporter, "close", None)
    if callable(close):
        close()


def flush_reporter(reporter: object) -> None:
    """Call the reporter's `flush()`, if it has one: it returns when all is sent, or time is up."""
    flush = getattr(reporter, "flush", None)
    if callable(flush):
        flush()


def lost_by(reporter: object) -> int:
    """How many reports it took, and could not send on."""
    lost = getattr(reporter, "lost", 0)
    return lost if isinstance(lost, int) else 0
