"""Reporters: ready-made ones, ones that filter for another, and a name for each.

A reporter is anything that can be called with a `Report`. If it has a `close()`, that is called
when the guard that it was given to is uninstalled.
"""

from __future__ import annotations

from closewait_guard.reporters.console import console
from closewait_guard.reporters.filters import at_least, changes, every
from closewait_guard.reporters.json_lines import json_lines
from closewait_guard.reporters.logging import logging
from closewait_guard.reporters.names import known_names, named
from closewait_guard.reporters.sentry import sentry
from closewait_guard.reporters.structlog import structlog
from closewait_guard.reporters.text import text
from closewait_guard.reporters.warn import SocketLeakWarning, warn
from closewait_guard.reporters.webhook import slack, webhook

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
    "sentry",
    "slack",
    "structlog",
    "text",
    "warn",
    "webhook",
]
