"""What the guard does upon signals: a report when asked for one, and one before SIGTERM's end."""

from __future__ import annotations

from closewait_guard._signal.report import SignalReport, WakeupReader
from closewait_guard._signal.sigterm import before_sigterm

__all__ = [
    "SignalReport",
    "WakeupReader",
    "before_sigterm",
]
