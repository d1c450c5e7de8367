"""Who is told: ready-made reporters, reporters that wrap another, and a name for each.

A reporter is anything that can be called with a `Report`. What has a `close()` is closed when the
guard that it was given to is uninstalled.
"""

from __future__ import annotations

from closewait_guard.reporters._at_least import at_least
from closewait_guard.reporters._changes import changes
from closewait_guard.reporters._console import console
from closewait_guard.reporters._every import every
from closewait_guard.reporters._json_lines import json_lines
from closewait_guard.reporters._logging import logging
from closewait_guard.reporters._named import known_names, named
from closewait_guard.reporters._structlog import structlog
from closewait_guard.reporters._text import text
from closewait_guard.reporters._warn import SocketLeakWarning, warn

__all__ = [
    "SocketLeakWarning",
    "at_least",
    "changes",
    "console",
    "every",
    "json_lines",
    "known_names",
    "logging",
    "named",
    "structlog",
    "text",
    "warn",
]
