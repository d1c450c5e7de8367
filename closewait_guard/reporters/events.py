"""A report as flat log events: one for each site, each alert, and each site that closed late.

Many logs end on a terminal, so names that come from outside are escaped here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from closewait_guard._enums import is_about_descriptors
from closewait_guard._format import (
    escape_line,
    format_duration,
    page_of,
    pluralize,
    summarize_addresses,
    unique,
)
from closewait_guard._render import descriptor_kinds, verdict_name
from closewait_guard.model import (
    Alert,
    AlertStatus,
    ClosedLate,
    Finding,
    FrameKind,
    Observation,
    Report,
    Scalar,
    Severity,
    SiteGroup,
    Verdict,
    site_key,
)

__all__ = [
    "Event",
    "NewSockets",
    "alert_event",
    "closed_late_events",
    "events",
    "site_event",
]


_MAX_SITES, _MAX_CALLS = 1000, 5


class Event(NamedTuple):
    """One log event: its level, whether that counts or debug does, its name, message and fields."""

    level: Severity
    is_news: bool
    name: str
    message: str
    fields: Mapping[str, Scalar]


class NewSockets:
    """Counts the sockets of each site that a log has not had yet."""

    def __init__(self) -> None:
        self._known: dict[object, frozenset[int]] = {}

    def count(self, group: SiteGroup) -> int:
        """How many of a site are new; from now on, they are known."""
        key = site_key(group.findings[0])
        known = self._known.pop(key, frozenset[int]())
        serials = {finding.observation.record.serial: finding for finding in group.findings}
        self._known[key] = frozenset(serials)
        while len(self._known) > _MAX_SITES:
            del self._known[next(iter(self._known))]
        return sum(serials[serial].count for serial in serials.keys() - known)


def events(report: Report, new_sockets: NewSockets | None = None) -> Iterator[Event]:
    """Alerts first, then the sites, worst first, then those that closed late.

    Args:
        report: The report.
        new_sockets: What the log has had so far, for the field `new`.
    """
    for alert in report.alerts:
        yield alert_event(alert, report)
    for group in report.by_site():
        event = site_event(group, report.pid)
        if new_sockets is not None:
            event = event._replace(fields={**event.fields, "new": new_sockets.count(group)})
        yield event
    yield from closed_late_events(report)


def closed_late_events(report: Report) -> Iterator[Event]:
    """One for each cause of which sockets were closed late."""
    for fingerprint, closed in groupby(
        sorted(report.closed_late, key=_fingerprint), key=_fingerprint
    ):
        yield _escape(_closed_late_event(list(closed), fingerprint, report.pid))


def alert_event(alert: Alert, report: Report) -> Event:
    """The event of an alert."""
    return _escape(_alert_event(alert, report))


def _alert_event(alert: Alert, report: Report) -> Event:
    resolved = alert.status is AlertStatus.RESOLVED
    own = {"kind": alert.kind, "status": alert.status, "severity": alert.severity}
    fields = {**alert.data, **own, **_code_fields(alert.code)}
    text = alert.message
    if (
        is_about_descriptors(alert.kind, alert.data)
        and not resolved
        and (kinds := descriptor_kinds(report))
    ):
        fields["descriptors"] = kinds
        text += f": {kinds}"
    return Event(
        Severity.INFO if resolved else alert.severity,
        True,  # noqa: FBT003 - an alert is always worth its severity's level
        "socket_alert",
        f"{alert.kind} {alert.status}: {text}",
        {**fields, "text": text, "pid": report.pid},
    )


def site_event(group: SiteGroup, pid: int) -> Event:
    """The event of a site of this process."""
    return _escape(_site_event(group, pid))


def _site_event(group: SiteGroup, pid: int) -> Event:
    observations = [finding.observation for finding in group.findings]
    oldest = max(each.ended_for for each in observations)
    is_lower_bound = any(each.is_lower_bound or each.unanswered for each in observations)
    owner = observations[0].owner
    peers = summarize_addresses(
        peer
        for each in observations
        for peer in (each.owner.peers if each.owner is not None else (each.peer,))
        if peer
    )
    fields: dict[str, Scalar] = {
        **_context_fields(group),
        **_code_fields(group.code),
        **_package_fields(group.findings[0]),
        **({"owner": owner.name} if owner is not None else {}),
        **_checkout_fields(group),
        **_unanswered_fields(group),
        "verdict": group.verdict.value,
        "severity": group.severity.value,
        "is_leak": group.verdict.is_leak,
        "count": group.count,
        "site": group.site.place if group.site is not None else None,
        "function": group.site.function if group.site is not None else None,
        "stack": _short_stack(group),
        **_state_fields(observations),
        "oldest_s": round(oldest, 3),
        "is_lower_bound": is_lower_bound,
        "peers": peers,
        "hint": group.hint,
        "held_by": next((each.holders[0] for each in group.findings if each.holders), None),
        "fingerprint": group.fingerprint,
        "pid": pid,
    }
    where = fields["site"] or "an unknown place"
    what = pluralize(group.count, "socket" if owner is None else owner.name)
    age = f", for {_longest(oldest, is_lower_bound)}" if owner is None else ""
    message = (
        f"{what} {verdict_name(group.verdict)}, {_how_opened(group.findings[0])} at {where}"
        f"{f' to {peers}' if peers else ''}{age}: {group.hint}"
        f"{f' ({group.code})' if group.code else ''}"
    )
    name = "socket_leak" if group.verdict.is_leak else "socket_finding"
    # Few idle connections in pools, and what is closing, are nothing to read of in a log.
    is_news = group.severity is not Severity.INFO
    return Event(group.severity, is_news, name, message, fields)


def _closed_late_event(closed: list[ClosedLate], fingerprint: str, pid: int) -> Event:
    finding = closed[0].finding
    site = finding.observation.record.site
    longest = max(each.after for each in closed)
    is_lower_bound = any(each.finding.observation.is_lower_bound for each in closed)
    count = sum(each.finding.count for each in closed)
    where = site.place if site is not None else "an unknown place"
    return Event(
        Severity.INFO,
        True,  # noqa: FBT003 - it was reported as a leak
        "socket_closed_late",
        f"{pluralize(count, 'socket')} {_how_opened(finding)} at {where} "
        f"{'given back' if finding.verdict is Verdict.CHECKED_OUT else 'closed'} late, "
        f"after {_longest(longest, is_lower_bound)}",
        {
            **_code_fields(finding.code),
            **_package_fields(finding),
            "verdict": finding.verdict.value,
            "count": count,
            "site": site.place if site is not None else None,
            "function": site.function if site is not None else None,
            "after_s": round(longest, 3),
            "is_lower_bound": is_lower_bound,
            "fingerprint": fingerprint,
            "pid": pid,
        },
    )


def _short_stack(group: SiteGroup) -> str | None:
    """The program's own calls, the innermost first; else the line that is shown."""
    record = group.findings[0].observation.record.blamed
    own = [frame for frame in record.stack if frame.kind is FrameKind.USER]
    if not own and group.site is not None:
        own = [group.site]
    calls = [f"{frame.module}:{frame.lineno} {frame.function}" for frame in own[:_MAX_CALLS]]
    return " < ".join([*calls, *(["..."] if len(own) > _MAX_CALLS else [])]) or None


def _state_fields(observations: Sequence[Observation]) -> dict[str, Scalar]:
    """The state of most of them, and what the peers have sent and no one has read."""
    described = [seen for seen in observations if seen.owner is None and seen.is_described]
    unread = [seen.unread for seen in described if seen.unread is not None]
    if not described:
        return {}
    [(state, _)] = Counter(seen.state.value for seen in described).most_common(1)
    return {"state": state, **({"unread": sum(unread)} if unread else {})}


def _how_opened(finding: Finding) -> str:
    return "opened" if finding.observation.checkout is None else "checked out"


def _checkout_fields(group: SiteGroup) -> dict[str, Scalar]:
    """The pool that they were taken from, of the one that was taken first."""
    checkouts = [seen for each in group.findings if (seen := each.observation.checkout) is not None]
    if not checkouts:
        return {}
    oldest = max(checkouts, key=lambda each: each.seconds)
    return {
        "pool": oldest.pool,
        "pool_out": oldest.out,
        "pool_max_size": oldest.max_size,
        "checked_out_s": round(oldest.seconds, 3),
    }


def _unanswered_fields(group: SiteGroup) -> dict[str, Scalar]:
    """For how long a peer has not answered, and what was tried, of the longest."""
    found = [seen for each in group.findings if (seen := each.observation.unanswered) is not None]
    if not found:
        return {}
    longest = max(found, key=lambda each: each.seconds)
    return {
        "unanswered_s": round(longest.seconds, 3),
        "attempts": longest.attempts,
        "heard_s": round(longest.heard_for, 3),
    }


def _code_fields(code: str) -> dict[str, Scalar]:
    return {"code": code, "code_url": page_of(code)} if code else {}


def _package_fields(finding: Finding) -> dict[str, Scalar]:
    """Whose code opened them, as far as that is known."""
    names = {"package": finding.package, "via": finding.via, "caller": finding.caller}
    return {name: value for name, value in names.items() if value}


def _context_fields(group: SiteGroup) -> dict[str, Scalar]:
    """Where the sockets were opened: of several values of a name, the first."""
    openers = [finding.observation.record.opener for finding in group.findings]
    labels = unique(label for record in openers for label in record.labels)
    first = openers[0]
    own = {"thread_name": first.thread, "task_name": first.task, "labels": ", ".join(labels)}
    return {**first.context, **{name: value for name, value in own.items() if value}}


def _longest(duration: float, is_lower_bound: bool) -> str:
    if is_lower_bound:
        return format_duration(duration, at_least=True)
    return f"up to {format_duration(duration)}"


def _fingerprint(closed: ClosedLate) -> str:
    """The fingerprint under which the leak was reported."""
    return closed.finding.fingerprint


def _escape(event: Event) -> Event:
    fields = {_safe_name(name): _safe_value(value) for name, value in event.fields.items()}
    return event._replace(message=escape_line(event.message), fields=fields)


def _safe_name(name: str) -> str:
    """Rename a field whose name logging refuses, or whose name has a meaning to structlog."""
    return f"{escape_line(name)}_" if name in _RESERVED_NAMES else escape_line(name)


_RESERVED_NAMES = frozenset(vars(logging.makeLogRecord({}))) | {
    "asctime",
    "event",
    "exception",
    "level",
    "logger",
    "message",
    "self",
    "timestamp",
}


def _safe_value(value: Scalar) -> Scalar:
    # Some logs would render a subclass of str by its own repr.
    return escape_line(str(value)) if isinstance(value, str) else value
