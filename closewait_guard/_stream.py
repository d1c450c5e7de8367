"""A stream to write to: the one that was given, or whatever stderr is at the moment."""

from __future__ import annotations

import sys
from typing import TextIO

from closewait_guard.exceptions import ConfigurationError

__all__ = ["checked_stream", "put"]


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
    if target is not None:
        target.write(_encodable(text, target))
        target.flush()


def _encodable(text: str, target: TextIO) -> str:
    """A path may hold letters that the terminal of a plain locale cannot show."""
    encoding = getattr(target, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
