"""What the guard does upon signals and as the program ends: reports, and looks before the last."""

from __future__ import annotations

from closewait_guard._signal.early_looks import EarlyLooks, check_at_end
from closewait_guard._signal.report import SignalReport, WakeupReader
from closewait_guard._signal.sudden_end import (
    SuddenEnd,
    before_sudden_end,
    delayed_sigterm,
    restore_default,
)

__all__ = [
    "EarlyLooks",
    "SignalReport",
    "SuddenEnd",
    "WakeupReader",
    "before_sudden_end",
    "check_at_end",
    "delayed_sigterm",
    "restore_default",
]
