"""How a guard gets into a program before its first import.

This folder stands first on PYTHONPATH, so that Python finds the `sitecustomize` in it as it starts.
"""

from __future__ import annotations

from closewait_guard._preload.status import (
    FOLDER,
    Channel,
    ChildConfig,
    SentReports,
    move_up,
    prints_json,
)

__all__ = [
    "FOLDER",
    "Channel",
    "ChildConfig",
    "SentReports",
    "move_up",
    "prints_json",
]
