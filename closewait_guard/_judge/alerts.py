"""The alerts: which hold in one report or a series, and when each is reported again. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from closewait_guard._enums import FOLLOWED, GONE, LEAKS, DescriptorKind
from closewait_guard._format import format_duration, pluralize
from closewait_guard._judge.growth import (
    OF_KIND,
    TOTAL,
    ActiveAlert,
    Series,
    SeriesPoint,
    churn_alerts,
    growth_alerts,
    last_count,
    make_alert,
    what_grows,
)
from closewait_guard.model import (
    Alert,
    AlertKind,
    AlertStatus,
    ClosedLate,
    Finding,
    FullPool,
    Report,
    Scalar,
    Severity,
    State,
    Verdict,
)
from closewait_guard.settings import Settings

__all__ = [
    "AlertState",
    "threshold_alerts",
    "update_alerts",
]


# An active alert ends only when its value is below this share of the limit, so that a value that
# swings about the limit is reported once.
_RESOLVED_SHARE = 0.9
_EXHAUSTION_LASTS = 60.0
# By then SQLAlchemy and psycopg_pool fail who waits for a connection, unless told otherwise.
_MAX_FULL = 30.0
# How many places an alert names.
_MAX_PLACES = 3
# Python 3.11 takes long to find a member by its name.
_CLOSE_WAIT, _CLOSING = State.CLOSE_WAIT, Verdict.CLOSING


def threshold_alerts(report: Report, settings: Settings) -> tuple[Alert, ...]:
    """The alerts of a report that is not part of a series."""
    return tuple(each.alert for each in active_thresholds(report, settings))


def active_thresholds(
    report: Report, settings: Settings, active: Collection[str] = ()
) -> Iterator[ActiveAlert]:
    """Yield the alerts whose limits are exceeded; active ones end only well below the limit."""
    waiting = _in_close_wait(report)
    yield from _count_alert(waiting, settings, active)
    yield from _fd_limit_alert(report, len(waiting), settings, active)
    yield from _age_alert(waiting, settings)
    yield from _pool_alerts(report.full_pools, settings)


def _in_close_wait(report: Report) -> list[Finding]:
    """Those that are so now: what was collected was closed by that, and only its record remains."""
    return [
        each
        for each in report.findings
        if each.observation.state is _CLOSE_WAIT and each.observation.evidence not in GONE
    ]


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
        alert = make_alert(AlertKind.COUNT, Severity.WARNING, message, data)
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
        alert = make_alert(AlertKind.FD_LIMIT, Severity.CRITICAL, message, data)
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
    yield ActiveAlert(AlertKind.AGE, count, make_alert(AlertKind.AGE, severity, message, data))


def _seconds_in_close_wait(finding: Finding) -> float:
    return finding.observation.peer_closed_for or 0.0


def _pool_alerts(pools: Iterable[FullPool], settings: Settings) -> Iterator[ActiveAlert]:
    """One for all pools of a name: it tells of the one that has been full for the longest."""
    full = sorted(
        (each for each in pools if each.full_for > _MAX_FULL), key=lambda each: -each.full_for
    )
    counts = Counter(each.name for each in full)
    for name, count in counts.items():
        longest = next(each for each in full if each.name == name)
        yield _pool_alert(longest, count - 1, settings)


def _pool_alert(pool: FullPool, others_full: int, settings: Settings) -> ActiveAlert:
    """No connection of a pool was given back, or taken, for as long as who waits will wait."""
    taken = list(pool.sites.items())
    where = [f"{count:,} at {place}" for place, count in taken[:_MAX_PLACES]]
    if others := sum(count for _, count in taken[_MAX_PLACES:]):
        where.append(f"{others:,} elsewhere")
    count = sum(pool.sites.values())
    message = (
        f"{count:,} of {pool.max_size:,} connections of {pool.name} are checked out, and none was "
        f"given back for {format_duration(pool.full_for)}: {', '.join(where)}; the oldest "
        f"{format_duration(pool.oldest_for)} ago"
    )
    if others_full:
        message += f"; {pluralize(others_full, 'other pool')} of that name likewise"
    data: dict[str, Scalar] = {
        "pool": pool.name,
        "count": count,
        "limit": pool.max_size,
        "full_for_s": round(pool.full_for, 3),
        "oldest_s": round(pool.oldest_for, 3),
        "site": taken[0][0] if taken else None,
    }
    is_critical = pool.full_for > settings.checkout_grace
    severity = Severity.CRITICAL if is_critical else Severity.WARNING
    alert = make_alert(AlertKind.POOL_EXHAUSTED, severity, message, data)
    return ActiveAlert(f"{AlertKind.POOL_EXHAUSTED}:{pool.name}", count, alert)


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
    alert = make_alert(AlertKind.FD_EXHAUSTED, Severity.CRITICAL, message, data)
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
            for finding in point.report.findings
            if finding.verdict in FOLLOWED and finding.observation.evidence not in GONE
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
        return {site: each.last for site, each in before.items() if site.startswith(OF_KIND)}
    counts = report.descriptors.by_kind.items()
    return {f"{OF_KIND}{kind}": n for kind, n in counts if kind != DescriptorKind.SOCKET}


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
            count = last_count(state.leaked, site)
            message = f"{what_grows(site)} no longer increase: {count:,} now"
        case AlertKind.CHURN:
            count, leaks = last_count(state.opened, site), last_count(state.leaked, site)
            message = (
                f"open sockets{of_site} no longer increase: {count:,} now, and {leaks:,} leaked"
            )
        case AlertKind.FD_EXHAUSTED:
            count, message = 0, "file descriptors are available again"
        case AlertKind.POOL_EXHAUSTED:
            count, message = 0, f"connections of {site} are given back again"
        case _:
            count = len(_in_close_wait(report))
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
