"""What the guard does upon signals and as the program ends: reports, and looks before the last."""

from __future__ import annotations

from closewait_guard._signal.early_looks import EarlyLooks
from closewait_guard._signal.report import SignalReport, WakeupReader
from closewait_guard._signal.sigterm import before_sigterm, delayed_sigterm

__all__ = [
    "EarlyLooks",
    "SignalReport",
    "WakeupReader",
    "before_sigterm",
    "delayed_sigterm",
]
