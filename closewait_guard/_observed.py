"""One socket at one moment, as every stage after the look knows it."""

from __future__ import annotations

from closewait_guard._probe import Endpoint, View
from closewait_guard._socket_values import Observation, SocketRecord

__all__ = ["observed"]


def observed(
    record: SocketRecord,
    fd: int,
    endpoint: Endpoint,
    view: View,
    closed_for: float | None = None,
    suspicious_for: float | None = None,
    *,
    close_called: bool = False,
    in_use: bool = False,
) -> Observation:
    """Put together what the stages before have found out.

    Args:
        record: What is known of its birth.
        fd: Its number.
        endpoint: What does not change about it.
        view: What the look showed.
        closed_for: Seconds since its peer closed.
        suspicious_for: Seconds for which nobody has done anything about it.
        close_called: Whether the program has called `close()`.
        in_use: Whether a thread reads from its file object at this moment.
    """
    # By position and in order: naming nineteen arguments takes as long as storing them.
    return Observation(
        record,
        fd,
        endpoint.inode,
        endpoint.family,
        endpoint.type,
        endpoint.local,
        endpoint.peer,
        view.state,
        view.evidence,
        closed_for,
        view.unread,
        view.last_sent_for,
        view.last_received_for,
        endpoint.tls,
        close_called,
        view.connection,
        suspicious_for,
        view.unsent,
        in_use,
    )
