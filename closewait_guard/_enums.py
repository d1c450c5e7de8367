"""The enumerations of a report: origins, states, kinds, evidence, verdicts, severities, alerts."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

__all__ = [
    "DESCRIPTOR_KIND",
    "FOLLOWED",
    "GONE",
    "LEAKS",
    "NOT_INSTALLED",
    "SURPLUS_CLIENTS",
    "AlertKind",
    "AlertStatus",
    "Connection",
    "DescriptorKind",
    "Evidence",
    "FrameKind",
    "Origin",
    "Scalar",
    "Severity",
    "State",
    "Verdict",
    "Word",
    "is_about_descriptors",
]


class Word(StrEnum):
    """Hashed in C, as the text that it is: Enum's own hash would be a call of Python."""

    __hash__ = str.__hash__


class Origin(Word):
    """How a descriptor came into the program's hands."""

    CREATED = "created"
    ACCEPTED = "accepted"
    DUPLICATED = "duplicated"
    WRAPPED = "wrapped"
    DETACHED = "detached"
    ADOPTED = "adopted"
    INHERITED = "inherited"
    NATIVE = "native"
    CHECKED_OUT = "checked_out"


# What a context, the data of an alert or a setting consists of once it is plain.
Scalar = str | int | float | bool | None


class FrameKind(Word):
    """Whose code a frame is."""

    USER = "user"
    LIBRARY = "library"
    STDLIB = "stdlib"


class State(Word):
    """The kernel's TCP states, and two for what has none."""

    ESTABLISHED = "ESTABLISHED"
    SYN_SENT = "SYN_SENT"
    SYN_RECV = "SYN_RECV"
    FIN_WAIT1 = "FIN_WAIT1"
    FIN_WAIT2 = "FIN_WAIT2"
    TIME_WAIT = "TIME_WAIT"
    CLOSE = "CLOSE"
    CLOSE_WAIT = "CLOSE_WAIT"
    LAST_ACK = "LAST_ACK"
    LISTEN = "LISTEN"
    CLOSING = "CLOSING"
    NEW_SYN_RECV = "NEW_SYN_RECV"
    UNIX = "unix"
    NONE = "none"


class Connection(Word):
    """What is left of the connection, whatever its protocol calls that."""

    NEVER_CONNECTED = "never_connected"
    UNCONNECTED = "unconnected"
    LIVE = "live"
    PEER_CLOSED = "peer_closed"
    GONE = "gone"
    NOT_APPLICABLE = "not_applicable"


class Evidence(Word):
    """What an observation rests on."""

    TCP_INFO = "tcp_info"
    POLL = "poll"
    PEEK = "peek"
    TABLE = "table"
    FINALIZED = "finalized"
    COLLECTED = "collected"
    INODE = "inode"
    OWNER = "owner"
    OPEN_OWNER = "open_owner"


class DescriptorKind(Word):
    """What a descriptor is open on."""

    SOCKET = "socket"
    PIPE = "pipe"
    FILE = "file"
    DIRECTORY = "directory"
    DEVICE = "device"
    EPOLL = "epoll"
    EVENTFD = "eventfd"
    TIMERFD = "timerfd"
    SIGNALFD = "signalfd"
    INOTIFY = "inotify"
    PIDFD = "pidfd"
    IO_URING = "io_uring"
    MEMFD = "memfd"
    OTHER = "other"


# That of what was collected, or lost its last reference: nothing can close it any more.
GONE = frozenset({Evidence.FINALIZED, Evidence.COLLECTED})


class Verdict(Word):
    """What was found out about a socket, or an owner of sockets; the first seven are leaks."""

    LEAKED = "leaked"
    DEAD = "dead"
    DROPPED = "dropped"
    LINGERING = "lingering"
    INHERITED = "inherited"
    UNCLOSED = "unclosed"
    SURPLUS = "surplus"
    CLOSED_ELSEWHERE = "closed_elsewhere"
    CHECKED_OUT = "checked_out"
    UNANSWERED = "unanswered"
    IDLE_OR_LEAKED = "idle_or_leaked"
    STALE_POOL = "stale_pool"
    HALF_CLOSED = "half_closed"
    CLOSING = "closing"
    OPEN = "open"

    @property
    def is_leak(self) -> bool:
        """Whether the program should have closed the socket."""
        return self in LEAKS

    @property
    def rank(self) -> int:
        """The place in the order worst first."""
        return _VERDICTS.index(self)


_VERDICTS = tuple(Verdict)
LEAKS = frozenset(_VERDICTS[:7])
# What is news when it is found, and when it is over.
FOLLOWED = LEAKS | {Verdict.CHECKED_OUT}
# The code of idle connections in more clients of one line than it needs.
SURPLUS_CLIENTS = "CWG705"
# The note of a coverage that covers every socket that is older than the guard.
NOT_INSTALLED = "where sockets were opened, because the guard is not installed"


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
    POOL_EXHAUSTED = "pool_exhausted"


# In the data of an alert on descriptors of one kind.
DESCRIPTOR_KIND = "descriptor_kind"


def is_about_descriptors(kind: AlertKind, data: Mapping[str, Scalar]) -> bool:
    """Whether an alert is about descriptors of any kind, not about sockets only."""
    return kind in (AlertKind.FD_LIMIT, AlertKind.FD_EXHAUSTED) or DESCRIPTOR_KIND in data


class AlertStatus(Word):
    """What is new about an alert. It is reported once, and again only if this changes."""

    RAISED = "raised"
    CHANGED = "changed"
    RESOLVED = "resolved"
