"""The alerts of a series of reports: each is reported when it begins, gets worse and ends. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from closewait_guard._judge.alerts import (
    TOTAL,
    ActiveAlert,
    SeriesPoint,
    active_thresholds,
    churn_alerts,
    exhaustion_alerts,
    growth_alerts,
)
from closewait_guard._judge.growth import Series
from closewait_guard.model import (
    Alert,
    AlertKind,
    AlertStatus,
    ClosedLate,
    Finding,
    Report,
    Verdict,
)
from closewait_guard.settings import Settings

__all__ = [
    "AlertState",
    "SeriesPoint",
    "update_alerts",
]


# An alert is reported again when its value has risen by this factor.
_MIN_RISE = 2.0


class _ReportedAlert(NamedTuple):
    """An alert as it was last reported, and for how many reports its condition has not held."""

    reported: ActiveAlert
    absent: int = 0


class AlertState(NamedTuple):
    """The state from one report to the next: series by site, active alerts, known leaks."""

    leaked: Mapping[str, Series] = {}
    opened: Mapping[str, Series] = {}
    active: Mapping[str, _ReportedAlert] = {}
    leaks: Mapping[int, tuple[Finding, float]] = {}
    exhausted: int = 0
    exhausted_at: float | None = None


def update_alerts(
    state: AlertState, point: SeriesPoint, settings: Settings
) -> tuple[AlertState, tuple[Alert, ...], tuple[ClosedLate, ...]]:
    """Add one report: return the new state, the alerts to report, and the leaks closed late."""
    leaked = _extend_series(state.leaked, _leaks_by_site(point.report), point.at, settings)
    counts = {site: number.open for site, number in point.open_by_site.items()}
    opened = _extend_series(state.opened, counts, point.at, settings)
    is_new = point.exhausted > state.exhausted
    following = AlertState(
        leaked=leaked,
        opened=opened,
        leaks={
            finding.observation.record.serial: (finding, point.at)
            for finding in point.report.leaks
            if finding.verdict is not Verdict.DROPPED
        },
        exhausted=point.exhausted,
        exhausted_at=point.at if is_new else state.exhausted_at,
    )
    present = [
        *exhaustion_alerts(point, state.exhausted, following.exhausted_at),
        *active_thresholds(point.report, settings, state.active),
        *growth_alerts(leaked, point),
        *churn_alerts(opened, leaked, point),
    ]
    active, alerts = _diff(state, following, present)
    return following._replace(active=active), alerts, tuple(_find_closed_late(state, point))


def _leaks_by_site(report: Report) -> dict[str, int]:
    counts = Counter({TOTAL: len(report.leaks)})
    for finding in report.leaks:
        site = finding.observation.record.site
        if site is not None:
            counts[site.call] += 1
    return counts


def _extend_series(
    before: Mapping[str, Series], counts: Mapping[str, int], at: float, settings: Settings
) -> dict[str, Series]:
    """Add a count to every site's series; drop those that have been at zero for a window."""
    if not settings.growth_window:
        return {}
    following = {}
    for site in before.keys() | {site for site, count in counts.items() if count}:
        series = before.get(site) or Series(settings.growth_window)
        if counts.get(site) or not series.is_level_at_zero:
            following[site] = series.with_count(at, counts.get(site, 0))
    return following


def _diff(
    before: AlertState, following: AlertState, present: list[ActiveAlert]
) -> tuple[dict[str, _ReportedAlert], tuple[Alert, ...]]:
    active: dict[str, _ReportedAlert] = {}
    alerts: list[Alert] = []
    for current in present:
        last = before.active.get(current.key)
        if last is not None and not _has_changed(last.reported, current):
            active[current.key] = _ReportedAlert(last.reported)
            continue
        status = AlertStatus.RAISED if last is None else AlertStatus.CHANGED
        alerts.append(replace(current.alert, status=status))
        active[current.key] = _ReportedAlert(current)
    for key in before.active.keys() - active.keys():
        reported, absent = before.active[key]
        if absent + 1 < _reports_until_resolved(key, reported, following):
            active[key] = _ReportedAlert(reported, absent + 1)
        else:
            alerts.append(replace(reported.alert, status=AlertStatus.RESOLVED))
    return active, tuple(alerts)


def _has_changed(reported: ActiveAlert, current: ActiveAlert) -> bool:
    return (
        current.alert.severity is not reported.alert.severity
        or current.size >= reported.size * _MIN_RISE
    )


def _reports_until_resolved(key: str, reported: ActiveAlert, state: AlertState) -> int:
    """For how many reports the condition of an alert must not hold before it is resolved.

    Noise may hide growth for some reports; closed sockets end it at once.
    """
    kind, _, site = key.partition(":")
    histories = {AlertKind.GROWTH: state.leaked, AlertKind.CHURN: state.opened}
    series = histories.get(AlertKind(kind), {}).get(site)
    has_shrunk = series is None or series.last <= reported.size / 2
    return 1 if series is None or has_shrunk else max(1, series.window // 3)


def _find_closed_late(state: AlertState, point: SeriesPoint) -> Iterator[ClosedLate]:
    current = {finding.observation.record.serial for finding in point.report.findings}
    for serial, (finding, at) in state.leaks.items():
        if serial not in current and serial not in point.still_open:
            yield ClosedLate(finding, finding.observation.ended_for + point.at - at)
