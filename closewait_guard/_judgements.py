"""The words for what is thought of it: verdicts, severities, alerts."""

from __future__ import annotations

from closewait_guard._origin import Word

__all__ = ["AlertKind", "AlertStatus", "Severity", "Verdict"]


class Verdict(Word):
    """What is to be thought of a socket; the first five accuse the program."""

    LEAKED = "leaked"
    DEAD = "dead"
    DROPPED = "dropped"
    LINGERING = "lingering"
    INHERITED = "inherited"
    STOLEN = "stolen"
    STALE_POOL = "stale_pool"
    HALF_CLOSED = "half_closed"
    CLOSING = "closing"
    OPEN = "open"

    @property
    def accused(self) -> bool:
        """Whether the program should have closed the socket."""
        return self in _ACCUSED

    @property
    def rank(self) -> int:
        """The place in the order worst first."""
        return _VERDICTS.index(self)


_VERDICTS = tuple(Verdict)
_ACCUSED = frozenset(_VERDICTS[:5])


class Severity(Word):
    """How bad it is; `rank` orders."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """0 for info, 2 for critical."""
        return _SEVERITIES.index(self)


_SEVERITIES = tuple(Severity)


class AlertKind(Word):
    """What an alert is about."""

    COUNT = "count"
    AGE = "age"
    GROWTH = "growth"
    CHURN = "churn"
    FD_LIMIT = "fd_limit"
    FD_EXHAUSTED = "fd_exhausted"


class AlertStatus(Word):
    """What there is to tell of an alert now. It is told once, and again only if this changes."""

    RAISED = "raised"
    CHANGED = "changed"
    RESOLVED = "resolved"
