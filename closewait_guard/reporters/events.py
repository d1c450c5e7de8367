"""A report as flat events: one for each site, each alert, and each site that closed late.

Many logs end on a terminal, so what others have named is escaped here already.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import NamedTuple

from closewait_guard._format import format_duration, one_line, pluralize, summarize_addresses
from closewait_guard.model import (
    Alert,
    AlertStatus,
    ClosedLate,
    Report,
    Scalar,
    Severity,
    SiteGroup,
)

__all__ = [
    "Event",
    "events",
]


class Event(NamedTuple):
    """One line of a log: how bad, what it is called, a sentence, and what can be queried."""

    severity: Severity
    is_news: bool
    name: str
    sentence: str
    facts: Mapping[str, Scalar]


def events(report: Report) -> Iterator[Event]:
    """Alerts first, then the sites, worst first, then those that closed late."""
    yield from map(_escaped, _all(report))


def _all(report: Report) -> Iterator[Event]:
    for alert in report.alerts:
        yield _alert(alert, report.pid)
    for group in report.by_site():
        yield _site(group, report.pid)
    for fingerprint, closed in groupby(
        sorted(report.closed_late, key=_fingerprint), key=_fingerprint
    ):
        yield _closed(list(closed), fingerprint, report.pid)


def _alert(alert: Alert, pid: int) -> Event:
    resolved = alert.status is AlertStatus.RESOLVED
    facts = {**alert.data, "kind": alert.kind, "status": alert.status, "severity": alert.severity}
    return Event(
        Severity.INFO if resolved else alert.severity,
        True,  # noqa: FBT003 - an alert is told only when there is news
        "socket_alert",
        f"{alert.kind} {alert.status}: {alert.message}",
        {**facts, "text": alert.message, "pid": pid},
    )


def _site(group: SiteGroup, pid: int) -> Event:
    first = group.findings[0]
    oldest = max(leak.observation.ended_for for leak in group.findings)
    peers = summarize_addresses(
        leak.observation.peer for leak in group.findings if leak.observation.peer
    )
    facts: dict[str, Scalar] = {
        "verdict": group.verdict.value,
        "severity": group.severity.value,
        "is_leak": group.verdict.is_leak,
        "count": group.count,
        "site": group.site.place if group.site is not None else None,
        "function": group.site.function if group.site is not None else None,
        "oldest_s": round(oldest, 3),
        "peers": peers,
        "hint": first.hint,
        "fingerprint": group.fingerprint,
        "pid": pid,
    }
    where = facts["site"] or "an unknown place"
    sentence = (
        f"{pluralize(group.count, 'socket')} {group.verdict.replace('_', ' ')}, opened at {where}"
        f"{f' to {peers}' if peers else ''}, for up to {format_duration(oldest)}: {first.hint}"
    )
    return Event(group.severity, group.verdict.is_leak, "socket_leak", sentence, facts)


def _closed(closed: list[ClosedLate], fingerprint: str, pid: int) -> Event:
    leak = closed[0].finding
    site = leak.observation.record.site
    longest = max(each.after for each in closed)
    many = sum(each.finding.count for each in closed)
    where = site.place if site is not None else "an unknown place"
    return Event(
        Severity.INFO,
        True,  # noqa: FBT003 - that it closed is told once
        "socket_closed_late",
        f"{pluralize(many, 'socket')} opened at {where} closed late, "
        f"after up to {format_duration(longest)}",
        {
            "verdict": leak.verdict.value,
            "count": many,
            "site": site.place if site is not None else None,
            "function": site.function if site is not None else None,
            "after_s": round(longest, 3),
            "fingerprint": fingerprint,
            "pid": pid,
        },
    )


def _fingerprint(closed: ClosedLate) -> str:
    """That of the site as it was told when the socket was leaked."""
    return closed.finding.fingerprint


def _escaped(event: Event) -> Event:
    facts = {_name(name): _plain(value) for name, value in event.facts.items()}
    return event._replace(sentence=one_line(event.sentence), facts=facts)


def _name(name: str) -> str:
    """Logging refuses some names, and to structlog some mean more than a value."""
    return f"{one_line(name)}_" if name in _TAKEN else one_line(name)


_TAKEN = frozenset(vars(logging.makeLogRecord({}))) | {
    "asctime",
    "event",
    "exception",
    "level",
    "logger",
    "message",
    "self",
    "timestamp",
}


def _plain(value: Scalar) -> Scalar:
    # A subclass of str would be rendered by its own repr in some logs.
    return one_line(str(value)) if isinstance(value, str) else value
