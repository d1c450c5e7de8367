"""Whose place a younger socket has taken: the program has connected anew, and kept the old one."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nlargest
from operator import itemgetter

from closewait_guard._probe import peer_of
from closewait_guard._records import record_of
from closewait_guard._registry import Registry
from closewait_guard._story import SERIAL, SOCK
from closewait_guard.model import Observation, Origin

__all__ = ["successors"]

# Of all that were born since, only the youngest are looked at.
_MOST = 200
# So much later at least: calls that follow each other at once do not take each other's place, and
# the end is dated by the kernel's ticks and by a look that was a while ago.
_PAUSE = 0.1


def successors(ended: Iterable[Observation], registry: Registry, wall: float) -> dict[int, int]:
    """By serial, the youngest that the same line has connected to the same peer since the end.

    Args:
        ended: Sockets that nobody uses any more.
        registry: Knows those that were born since.
        wall: About the time of the look, in seconds since the epoch.
    """
    old = {
        seen.record.serial: (wall - seen.useless_for + _PAUSE, seen.peer, seen.record.site)
        for seen in ended
        if seen.record.origin is Origin.CREATED and seen.peer
    }
    if not old:
        return {}
    found: dict[int, int] = {}
    living = registry.living().stories.values()
    for story in nlargest(_MOST, living, key=itemgetter(SERIAL)):
        sock, record = story[SOCK](), record_of(story, registry.pid)
        peer, born_at = peer_of(sock) if sock is not None else None, record.born_at or 0.0
        for serial, (end, to, site) in old.items():
            is_younger = record.serial > serial and born_at > end
            if is_younger and peer == to and record.site == site:
                found.setdefault(serial, record.serial)
    return found
