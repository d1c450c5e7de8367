"""What tells one descriptor from another of the same number."""

from __future__ import annotations

import os

__all__ = ["inode_of"]


def inode_of(fd: int) -> int | None:
    """What tells one open descriptor from the next that gets its number."""
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return None
