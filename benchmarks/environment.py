"""The environment of the processes that are measured."""

from __future__ import annotations

import os

__all__ = ["as_installed"]


def as_installed() -> dict[str, str]:
    """Ours, but for what forbids compiled files: an installed package comes compiled."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
