"""The alerts: which hold in one report or a series, and when each is reported again. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from closewait_guard._enums import DESCRIPTOR_KIND, GONE, LEAKS, DescriptorKind
from closewait_guard._format import format_duration, pluralize
from closewait_guard._inspect import SiteCount
from closewait_guard._judge.codes import ALERT_CODES
from closewait_guard._judge.growth import Growth, Series
from closewait_guard.model import (
    Alert,
    AlertKind,
    AlertStatus,
    ClosedLate,
    Finding,
    Report,
    Scalar,
    Severity,
    State,
    Verdict,
)
from closewait_guard.settings import Settings

__all__ = [
    "AlertState",
    "SeriesPoint",
    "threshold_alerts",
    "update_alerts",
]


# In place of a site: all leaks; and how the descriptors of a kind are called.
TOTAL, _OF_KIND = "", "descriptors of kind "
# An active alert ends only when its value is below this share of the limit, so that a value that
# swings about the limit is reported once.
_RESOLVED_SHARE = 0.9
# Fewer healthy sockets, or files, than this come and go with the load.
_MIN_CHURN = 10
_MIN_SHARE_STILL_OPEN = 0.8
_CRITICAL_TIME_LEFT = 3600.0
_EXHAUSTION_LASTS = 60.0
# Python 3.11 takes long to find a member by its name.
_CLOSE_WAIT, _CLOSING = State.CLOSE_WAIT, Verdict.CLOSING


class ActiveAlert(NamedTuple):
    """An alert whose condition holds now: its kind and site, and the value that triggered it."""

    key: str
    size: float
    alert: Alert


class SeriesPoint(NamedTuple):
    """One report of a series, and what else is known at its time.

    Attributes:
        at: By a monotonic clock.
        open_by_site: Healthy sockets too; `old` counts those opened over half a window ago.
        exhausted: How often no descriptor was left to create or accept a socket, so far.
        still_open: Serials of leaks of the report before that are still open.
    """

    at: float
    report: Report
    open_by_site: Mapping[str, SiteCount]
    exhausted: int
    still_open: frozenset[int]


def threshold_alerts(report: Report, settings: Settings) -> tuple[Alert, ...]:
    """The alerts of a report that is not part of a series."""
    return tuple(each.alert for each in active_thresholds(report, settings))


def active_thresholds(
    report: Report, settings: Settings, active: Collection[str] = ()
) -> Iterator[ActiveAlert]:
    """Yield the alerts whose limits are exceeded; active ones end only well below the limit."""
    waiting = [each for each in report.findings if each.observation.state is _CLOSE_WAIT]
    yield from _count_alert(waiting, settings, active)
    yield from _fd_limit_alert(report, len(waiting), settings, active)
    yield from _age_alert(waiting, settings)


def _make_alert(
    kind: AlertKind, severity: Severity, message: str, data: Mapping[str, Scalar]
) -> Alert:
    return Alert(kind, severity, message, data, code=ALERT_CODES[kind])


def _limit_to_exceed(kind: AlertKind, limit: float, active: Collection[str]) -> float:
    return limit * _RESOLVED_SHARE if kind.value in active else limit


def _count_alert(
    waiting: Iterable[Finding], settings: Settings, active: Collection[str]
) -> Iterator[ActiveAlert]:
    # Those of a burst that are closing at this moment are gone by the next report.
    count = sum(each.verdict is not _CLOSING for each in waiting)
    if count > _limit_to_exceed(AlertKind.COUNT, settings.count_warning, active):
        message = (
            f"{pluralize(count, 'socket')} in CLOSE_WAIT, more than {settings.count_warning:,}"
        )
        data = {"count": count, "limit": settings.count_warning}
        alert = _make_alert(AlertKind.COUNT, Severity.WARNING, message, data)
        yield ActiveAlert(AlertKind.COUNT, count, alert)


def _fd_limit_alert(
    report: Report, count: int, settings: Settings, active: Collection[str]
) -> Iterator[ActiveAlert]:
    limit, used = report.fd_limit, report.fd_used or 0
    if not limit:
        return
    waiting = _limit_to_exceed(AlertKind.FD_LIMIT, limit * settings.fd_share_critical, active)
    in_use = _limit_to_exceed(AlertKind.FD_LIMIT, limit * settings.fd_used_critical, active)
    if count > waiting or used > in_use:
        in_use_now = f"{used:,} of {limit:,} descriptors are in use ({used / limit:.0%})"
        if report.fd_used is None:
            in_use_now = f"the limit is {limit:,} descriptors"
        message = f"{in_use_now}, {count:,} of them in CLOSE_WAIT"
        data = {"fd_used": report.fd_used, "fd_limit": limit, "count": count}
        alert = _make_alert(AlertKind.FD_LIMIT, Severity.CRITICAL, message, data)
        yield ActiveAlert(AlertKind.FD_LIMIT, max(used, count), alert)


def _age_alert(findings: Iterable[Finding], settings: Settings) -> Iterator[ActiveAlert]:
    waiting = [finding for finding in findings if finding.verdict in LEAKS]
    oldest = max(waiting, key=_seconds_in_close_wait, default=None)
    if oldest is None or _seconds_in_close_wait(oldest) <= min(
        settings.age_warning, settings.age_critical
    ):
        return
    age = _seconds_in_close_wait(oldest)
    is_critical = age > settings.age_critical
    limit = settings.age_critical if is_critical else settings.age_warning
    count = sum(_seconds_in_close_wait(finding) > limit for finding in waiting)
    is_lower_bound = any(finding.observation.is_lower_bound for finding in waiting)
    site = oldest.observation.record.site
    where = f", opened at {site.call}" if site is not None else ""
    message = (
        f"{pluralize(count, 'socket')} in CLOSE_WAIT for more than {format_duration(limit)}; "
        f"the oldest for {format_duration(age, at_least=is_lower_bound)}{where}"
    )
    data = {"count": count, "oldest_s": round(age, 3), "site": site.place if site else None}
    severity = Severity.CRITICAL if is_critical else Severity.WARNING
    # Its size is the count: it is reported again when there are many more, not as time passes.
    yield ActiveAlert(AlertKind.AGE, count, _make_alert(AlertKind.AGE, severity, message, data))


def _seconds_in_close_wait(finding: Finding) -> float:
    return finding.observation.peer_closed_for or 0.0


def growth_alerts(leaked: Mapping[str, Series], point: SeriesPoint) -> Iterator[ActiveAlert]:
    """Yield alerts for sites, or the total, whose leaks keep growing, and for kinds that do."""
    growths = {site: growth for site, each in leaked.items() if (growth := each.growth)}
    kinds = {site for site in growths if site.startswith(_OF_KIND)}
    for site, growth in growths.items():
        if site in kinds:
            is_news = growth.risen >= _MIN_CHURN
        else:
            # The total is reported only if no site of its own explains it.
            is_news = site != TOTAL or growths.keys() - kinds == {TOTAL}
        if is_news:
            yield _make_growth_alert(site, growth, leaked[site].last, point.report)


def _make_growth_alert(site: str, growth: Growth, count: int, report: Report) -> ActiveAlert:
    left = _seconds_left(growth, report)
    kind = site.removeprefix(_OF_KIND)
    message = (
        f"{_what_grows(site)} keep growing: {count:,} now, {growth.risen:,} more than "
        f"{format_duration(growth.seconds)} ago, {_rate(growth)} a minute"
    )
    if left is not None:
        message += f"; at this rate the descriptor limit is reached in {format_duration(left)}"
    data: dict[str, Scalar] = {
        "site": (site or None) if kind == site else None,
        "count": count,
        "per_minute": round(growth.per_minute, 4),
        "risen": growth.risen,
        "seconds": round(growth.seconds, 1),
        "limit_reached_in_s": None if left is None else round(left),
    }
    if kind != site:
        data[DESCRIPTOR_KIND] = kind
    is_near = left is not None and left < _CRITICAL_TIME_LEFT
    severity = Severity.CRITICAL if is_near else Severity.WARNING
    alert = _make_alert(AlertKind.GROWTH, severity, message, data)
    return ActiveAlert(f"{AlertKind.GROWTH}:{site}", count, alert)


def _what_grows(site: str) -> str:
    if site.startswith(_OF_KIND):
        return site
    return f"leaked sockets of {site}" if site else "leaked sockets"


def _rate(growth: Growth) -> str:
    return f"{growth.per_minute:,.0f}" if growth.per_minute >= 10 else f"{growth.per_minute:.2g}"


def _seconds_left(growth: Growth, report: Report) -> float | None:
    if not report.fd_limit or report.fd_used is None or growth.per_minute <= 0:
        return None
    return max(0, report.fd_limit - report.fd_used) / growth.per_minute * 60


def churn_alerts(
    opened: Mapping[str, Series], leaked: Mapping[str, Series], point: SeriesPoint
) -> Iterator[ActiveAlert]:
    """Yield alerts for sites that open sockets faster than they close them, without a leak."""
    for site, series in opened.items():
        growth, leaking = series.growth, leaked.get(site)
        if growth is None or growth.risen < _MIN_CHURN or (leaking is not None and leaking.growth):
            continue
        count, before = series.last, series.count_half_window_ago
        # Those that have leaked may all be old.
        old = point.open_by_site.get(site, SiteCount(0, 0)).old - _last(leaked, site)
        # Many short connections also make many open sockets, but never the same ones.
        if not count or old < before * _MIN_SHARE_STILL_OPEN:
            continue
        message = (
            f"sockets of {site} are made faster than they are closed: {count:,} are open, "
            f"{growth.risen:,} more than {format_duration(growth.seconds)} ago, and {old:,} of "
            f"the {before:,} that were open half-way are open still"
        )
        data: dict[str, Scalar] = {
            "site": site,
            "count": count,
            "per_minute": round(growth.per_minute, 4),
            "risen": growth.risen,
            "seconds": round(growth.seconds, 1),
        }
        alert = _make_alert(AlertKind.CHURN, Severity.WARNING, message, data)
        yield ActiveAlert(f"{AlertKind.CHURN}:{site}", count, alert)


def _last(counts: Mapping[str, Series], site: str) -> int:
    return counts[site].last if site in counts else 0


def exhaustion_alerts(
    point: SeriesPoint, before: int, last_at: float | None
) -> Iterator[ActiveAlert]:
    """Yield the alert that no descriptor was left, until a minute after the last failure."""
    if last_at is None or point.at - last_at > _EXHAUSTION_LASTS:
        return
    failed = point.exhausted - before
    report = point.report
    message = (
        f"no descriptor was left for {pluralize(failed, 'socket')} to be made or accepted; "
        f"{report.fd_used or 0:,} of {report.fd_limit or 0:,} are in use"
    )
    data = {"count": failed, "fd_used": report.fd_used, "fd_limit": report.fd_limit}
    alert = _make_alert(AlertKind.FD_EXHAUSTED, Severity.CRITICAL, message, data)
    yield ActiveAlert(AlertKind.FD_EXHAUSTED, 1, alert)


# An alert is reported again when its value has risen by this factor.
_MIN_RISE = 2.0


class _ReportedAlert(NamedTuple):
    """An alert as it was last reported, and for how many reports its condition has not held."""

    reported: ActiveAlert
    absent: int = 0


class AlertState(NamedTuple):
    """The state from one report to the next: series by site, active alerts, known leaks.

    Attributes:
        leaked: How many have leaked; beside the sites, how many descriptors there are of each kind.
        opened: How many are open and have not leaked.
    """

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
    leaks = _leaks_by_site(point.report)
    kinds = _count_other_kinds(point.report, state.leaked)
    leaked = _extend_series(state.leaked, leaks | kinds, point.at, settings)
    # Growth is about those that have leaked.
    counts = {
        site: max(0, number.open - leaks.get(site, 0))
        for site, number in point.open_by_site.items()
    }
    opened = _extend_series(state.opened, counts, point.at, settings)
    is_new = point.exhausted > state.exhausted
    following = AlertState(
        leaked=leaked,
        opened=opened,
        leaks={
            finding.observation.record.serial: (finding, point.at)
            for finding in point.report.leaks
            if finding.observation.evidence not in GONE
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
    active, alerts = _diff(state, following, present, point.report)
    return following._replace(active=active), alerts, tuple(_find_closed_late(state, point))


def _leaks_by_site(report: Report) -> dict[str, int]:
    counts = Counter({TOTAL: len(report.leaks)})
    for finding in report.leaks:
        site = finding.observation.record.site
        if site is not None:
            counts[site.call] += 1
    return counts


def _count_other_kinds(report: Report, before: Mapping[str, Series]) -> dict[str, int]:
    """How many descriptors there are of each kind; sockets are followed by site."""
    if report.descriptors is None:
        return {site: each.last for site, each in before.items() if site.startswith(_OF_KIND)}
    counts = report.descriptors.by_kind.items()
    return {f"{_OF_KIND}{kind}": n for kind, n in counts if kind != DescriptorKind.SOCKET}


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
    before: AlertState, following: AlertState, present: list[ActiveAlert], report: Report
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
            alerts.append(_end(key, reported.alert, following, report))
    return active, tuple(alerts)


def _end(key: str, alert: Alert, state: AlertState, report: Report) -> Alert:
    """What is said of an alert that is over: what is so now."""
    _, _, site = key.partition(":")
    of_site = f" of {site}" if site else ""
    match alert.kind:
        case AlertKind.GROWTH:
            count = _last(state.leaked, site)
            message = f"{_what_grows(site)} no longer increase: {count:,} now"
        case AlertKind.CHURN:
            count, leaks = _last(state.opened, site), _last(state.leaked, site)
            message = (
                f"open sockets{of_site} no longer increase: {count:,} now, and {leaks:,} leaked"
            )
        case AlertKind.FD_EXHAUSTED:
            count, message = 0, "file descriptors are available again"
        case _:
            count = sum(each.observation.state is _CLOSE_WAIT for each in report.findings)
            message = f"{_AT_THE_END[alert.kind]}: {count:,} in CLOSE_WAIT"
    now: dict[str, Scalar] = {"count": count, "fd_used": report.fd_used}
    data = {**alert.data, **{name: value for name, value in now.items() if name in alert.data}}
    return replace(alert, status=AlertStatus.RESOLVED, message=message, data=data)


_AT_THE_END = {
    AlertKind.COUNT: "sockets are back below the limit of the alert",
    AlertKind.AGE: "no socket is in CLOSE_WAIT for so long any more",
    AlertKind.FD_LIMIT: "file descriptors are back below the limit of the alert",
}


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
