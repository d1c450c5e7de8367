"""The exit codes: promised to users."""

from __future__ import annotations

__all__ = ["FAILED_ON_LEAK", "FINE", "LEAKS_FOUND", "NO_VERDICT", "USAGE"]

FINE = 0
LEAKS_FOUND = 1
USAGE = 2
FAILED_ON_LEAK = 86
NO_VERDICT = 87
