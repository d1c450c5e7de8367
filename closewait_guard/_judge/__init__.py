"""Is it a leak? Verdicts, hints and alerts, as pure functions of observations."""

from __future__ import annotations

from closewait_guard._judge.alerts import (
    AlertState,
    SeriesPoint,
    threshold_alerts,
    update_alerts,
)
from closewait_guard._judge.hints import hint_for
from closewait_guard._judge.verdict import FindingText, judge, leave_to_calls, leave_to_pools

__all__ = [
    "AlertState",
    "FindingText",
    "SeriesPoint",
    "hint_for",
    "judge",
    "leave_to_calls",
    "leave_to_pools",
    "threshold_alerts",
    "update_alerts",
]
