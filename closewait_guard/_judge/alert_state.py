"""A series of reports in, alerts out, each told when it begins, gets worse, and ends: pure.

The thresholds are looked at report by report; growth and churn in the series.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from closewait_guard._judge.alerts import (
    TOTAL,
    ActiveAlert,
    SeriesPoint,
    churning,
    exhausted,
    growing,
    standing,
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


# A value that has doubled since an alert was told is news; less is not.
_WORSE = 2.0


class _Active(NamedTuple):
    """An alert as it was told, how large it was then, and for how many reports it has not held."""

    told: ActiveAlert
    absent: int = 0


class AlertState(NamedTuple):
    """What is kept from one report to the next."""

    leaked: Mapping[str, Series] = {}
    opened: Mapping[str, Series] = {}
    active: Mapping[str, _Active] = {}
    leaks: Mapping[int, tuple[Finding, float]] = {}
    exhausted: int = 0
    exhausted_at: float | None = None


def update_alerts(
    trend: AlertState, moment: SeriesPoint, settings: Settings
) -> tuple[AlertState, tuple[Alert, ...], tuple[ClosedLate, ...]]:
    """The trend with one more report; what there is to tell; and what was closed late."""
    leaked = _extended(trend.leaked, _leaks_by_site(moment.report), moment.at, settings)
    counts = {site: number.open for site, number in moment.open_by_site.items()}
    opened = _extended(trend.opened, counts, moment.at, settings)
    is_new = moment.exhausted > trend.exhausted
    following = AlertState(
        leaked=leaked,
        opened=opened,
        leaks={
            leak.observation.record.serial: (leak, moment.at)
            for leak in moment.report.leaks
            if leak.verdict is not Verdict.DROPPED
        },
        exhausted=moment.exhausted,
        exhausted_at=moment.at if is_new else trend.exhausted_at,
    )
    present = [
        *exhausted(moment, trend.exhausted, following.exhausted_at),
        *standing(moment.report, settings, trend.active),
        *growing(leaked, moment),
        *churning(opened, leaked, moment),
    ]
    active, alerts = _news(trend, following, present)
    return following._replace(active=active), alerts, tuple(_closed(trend, moment))


def _leaks_by_site(report: Report) -> dict[str, int]:
    counts = Counter({TOTAL: len(report.leaks)})
    for leak in report.leaks:
        site = leak.observation.record.site
        if site is not None:
            counts[site.call] += 1
    return counts


def _extended(
    before: Mapping[str, Series], counts: Mapping[str, int], at: float, settings: Settings
) -> dict[str, Series]:
    """Every site's history with one more count. One that has none is forgotten after a window."""
    if not settings.growth_window:
        return {}
    following = {}
    for site in before.keys() | {site for site, count in counts.items() if count}:
        series = before.get(site) or Series(settings.growth_window)
        if counts.get(site) or not series.is_level_at_zero:
            following[site] = series.followed_by(at, counts.get(site, 0))
    return following


def _news(
    before: AlertState, following: AlertState, present: list[ActiveAlert]
) -> tuple[dict[str, _Active], tuple[Alert, ...]]:
    active: dict[str, _Active] = {}
    alerts: list[Alert] = []
    for now in present:
        known = before.active.get(now.key)
        if known is None:
            alerts.append(now.alert)
        elif _is_changed(known.told, now):
            alerts.append(replace(now.alert, status=AlertStatus.CHANGED))
        is_told = known is not None and not _is_changed(known.told, now)
        active[now.key] = _Active(known.told if known is not None and is_told else now)
    for key in before.active.keys() - active.keys():
        told, absent = before.active[key]
        if absent + 1 < _patience(key, told, following):
            active[key] = _Active(told, absent + 1)
        else:
            alerts.append(replace(told.alert, status=AlertStatus.RESOLVED))
    return active, tuple(alerts)


def _is_changed(told: ActiveAlert, now: ActiveAlert) -> bool:
    return now.alert.severity is not told.alert.severity or now.size >= told.size * _WORSE


def _patience(key: str, told: ActiveAlert, trend: AlertState) -> int:
    """For how many reports an alert may fail to hold before it is told as resolved.

    Noise hides growth from time to time; sockets that are closed end it at once.
    """
    kind, _, site = key.partition(":")
    histories = {AlertKind.GROWTH: trend.leaked, AlertKind.CHURN: trend.opened}
    series = histories.get(AlertKind(kind), {}).get(site)
    has_shrunk = series is None or series.last <= told.size / 2
    return 1 if series is None or has_shrunk else max(1, series.window // 3)


def _closed(trend: AlertState, moment: SeriesPoint) -> Iterator[ClosedLate]:
    now = {leak.observation.record.serial for leak in moment.report.findings}
    for serial, (leak, at) in trend.leaks.items():
        if serial not in now and serial not in moment.still_open:
            yield ClosedLate(leak, leak.observation.ended_for + moment.at - at)
