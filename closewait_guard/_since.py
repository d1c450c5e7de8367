"""Since when a suspect has looked like this: pure, from one look to the next.

The kernel dates a peer's FIN. For everything else the guard's own earlier looks are what is known,
and any sign of life, such as unread data going down, starts the clock anew.
"""

from __future__ import annotations

from typing import NamedTuple

from closewait_guard._probe import View
from closewait_guard.model import Connection

__all__ = ["Sighting", "notice", "peer_closed_for", "suspect_for"]


class Sighting(NamedTuple):
    """What to remember of a suspect. Times are those of `_clock.now`.

    Attributes:
        seen_at: When the latest look was over.
        ended: What kind of end this is the sighting of.
        first_seen: When a look showed it for the first time.
        since: When it began, as far as the kernel and the earlier looks tell.
        quiet_since: When the program last did anything about it.
    """

    seen_at: float
    ended: tuple[Connection, bool]
    first_seen: float
    since: float
    quiet_since: float
    unread: int | None


def notice(
    view: View, close_called: bool, before: Sighting | None, at_most: float, now: float
) -> Sighting:
    """Take in one look.

    Args:
        view: What the look showed.
        close_called: Whether the program has called `close()`.
        before: The sighting of the look before, if the socket was a suspect then.
        at_most: For how long it can have been like this, for all that is known, if it was not.
        now: When this look was over.
    """
    ended = (view.connection, close_called)
    dated = None if view.fin_for is None else now - view.fin_for
    if before is None or before.ended != ended:
        began = dated if dated is not None else now - (at_most if before is None else 0.0)
        return Sighting(now, ended, now, began, began, view.unread)
    return Sighting(
        now,
        before.ended,
        before.first_seen,
        # Our own sending makes the peer's last word look younger than its FIN.
        before.since if dated is None else min(before.since, dated),
        before.quiet_since if view.unread == before.unread else now,
        view.unread,
    )


def peer_closed_for(view: View, sighting: Sighting, now: float) -> float | None:
    """Seconds since the peer's FIN by the kernel, or since the first look that saw its end.

    Args:
        view: What the look showed.
        sighting: What is remembered of it.
        now: When the look began: between that and its end, other threads may have had their turn,
            and an age must not be more than the kernel would say.
    """
    if view.connection is not Connection.PEER_CLOSED:
        return None
    if view.fin_for is not None:
        return now - sighting.since if now > sighting.since else 0.0
    return now - sighting.first_seen if sighting.first_seen < now else None


def suspect_for(view: View, sighting: Sighting, now: float) -> float | None:
    """For how long nothing has been done about an ended connection; None while it is live.

    As for `peer_closed_for`, `now` is when the look began.
    """
    connection, close_called = sighting.ended
    if connection is Connection.NOT_APPLICABLE or (
        connection is Connection.LIVE and not close_called
    ):
        return None
    last = max(sighting.since, sighting.quiet_since)
    quiet = now - last if now > last else 0.0
    if connection is not Connection.LIVE:
        return quiet
    # A closed socket that still carries data is in use through its file object.
    traffic = (view.last_sent_for, view.last_received_for)
    return min([quiet, *(seconds for seconds in traffic if seconds is not None)])
