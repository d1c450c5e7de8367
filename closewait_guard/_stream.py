"""A stream to write to: the one that was given, or whatever stderr is at the moment."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from io import BufferedWriter, TextIOWrapper
from typing import TextIO, cast

from closewait_guard._format import escape_control
from closewait_guard.exceptions import ConfigurationError

__all__ = [
    "checked_stream",
    "print_error",
    "put",
    "put_if_possible",
]


def checked_stream(reporter: str, stream: TextIO | None) -> TextIO | None:
    """The stream, if it is one."""
    if stream is not None and not (hasattr(stream, "write") and hasattr(stream, "flush")):
        raise ConfigurationError(
            f"{reporter}: stream must have write() and flush(), not {stream!r}"
        )
    return stream


def put(stream: TextIO | None, text: str) -> None:
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


def put_if_possible(text: str) -> None:
    """The same on stderr; where that is full or closed, there is nobody left to tell."""
    with suppress(OSError, ValueError):
        put(None, text)


def print_error(sentence: str) -> None:
    """One line on stderr, whatever letters the sentence quotes."""
    put_if_possible(f"closewait-guard: {escape_control(sentence)}\n")


def _encodable(text: str, target: TextIO) -> tuple[str, str]:
    """A path may hold letters that the terminal of a plain locale cannot show."""
    encoding = getattr(target, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding), encoding


def _is_plain(target: TextIO, encoding: str) -> bool:
    """Whether it is an ordinary file, in an encoding that begins with no mark."""
    return (
        type(target) is TextIOWrapper
        and type(target.buffer) is BufferedWriter
        and not ("".encode(encoding))
    )


def _write_through(target: TextIO, data: bytes) -> None:
    """Past the buffer: what fails and stays there fails again when the interpreter ends.

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
