"""Is it a leak? Verdicts, codes, hints and alerts, as pure functions of observations."""

from __future__ import annotations

from closewait_guard._judge.alerts import (
    AlertState,
    threshold_alerts,
    update_alerts,
)
from closewait_guard._judge.codes import ALERT_CODES, CODES, cause_code
from closewait_guard._judge.growth import SeriesPoint, fastest_growth
from closewait_guard._judge.hints import hint_for
from closewait_guard._judge.verdict import (
    FindingText,
    excusable_by_calls,
    judge,
    leave_to_calls,
    leave_to_pools,
    leave_undecided,
)

__all__ = [
    "ALERT_CODES",
    "CODES",
    "AlertState",
    "FindingText",
    "SeriesPoint",
    "cause_code",
    "excusable_by_calls",
    "fastest_growth",
    "hint_for",
    "judge",
    "leave_to_calls",
    "leave_to_pools",
    "leave_undecided",
    "threshold_alerts",
    "update_alerts",
]
