"""The words for what is seen: states, what is left of a connection, evidence."""

from __future__ import annotations

from closewait_guard._origin import Word

__all__ = [
    "Connection",
    "Evidence",
    "FrameKind",
    "Scalar",
    "State",
]


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
