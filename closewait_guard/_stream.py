"""A stream to write to: the one that was given, or whatever stderr is at the moment."""

from __future__ import annotations

import sys
from typing import TextIO

from closewait_guard.exceptions import ConfigurationError

__all__ = ["checked_stream", "put"]


def checked_stream(reporter: str, stream: TextIO | None) -> TextIO | None:
    """The stream, if it is one."""
    if stream is not None and not hasattr(stream, "write"):
        raise ConfigurationError(f"{reporter}: stream must have write(), not {stream!r}")
    return stream


def put(stream: TextIO | None, text: str) -> None:
    """Write all at once, so that what other threads write does not come between."""
    target = stream if stream is not None else sys.stderr
    # A program without a console has no stderr.
    if target is not None:
        target.write(text)
        target.flush()
