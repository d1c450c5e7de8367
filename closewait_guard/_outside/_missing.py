"""What may not be seen from outside; of its sockets, what the kernel tells everybody."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator

from closewait_guard._block import story
from closewait_guard._lines import folded
from closewait_guard._outside._onlooker import Found
from closewait_guard._outside._peers import peer_of
from closewait_guard._words import count_of

__all__ = ["apart", "told_missing", "user"]

_MOST_PEERS = 12


def apart(blocks: Iterable[str]) -> Iterator[str]:
    """Those with anything in them, a blank line between two."""
    for place, block in enumerate(filter(None, blocks)):
        yield f"\n{block}" if place else block


def told_missing(found: Found) -> str:
    """What may not be seen; of its sockets, what the kernel tells everybody."""
    parts = (_strays(found), _refused(found), _failed(found), _hidden(found))
    return "\n".join(apart("\n".join(lines) for lines in parts))


def _strays(found: Found) -> Iterator[str]:
    """Of others, whose processes may not be seen, what the kernel tells everybody."""
    for uid, seen in found.strays.items():
        yield from folded(
            f"{count_of(len(seen), 'socket')} in CLOSE_WAIT of user {user(uid)}, whose processes "
            "may not be looked into",
            "  ",
        )
        peers = Counter(peer_of(each) for each in seen)
        for peer, times in peers.most_common(_MOST_PEERS):
            of_peer = [each for each in seen if peer_of(each) == peer]
            yield from folded(f"  {times:,} x TCP {peer}: {story(of_peer)}", "    ")


def user(uid: int | None) -> str:
    """A user's name, or the number of one that has none here."""
    try:
        import pwd

        return pwd.getpwuid(uid if uid is not None else -1).pw_name
    except (ImportError, KeyError, OverflowError):
        return "unknown" if uid is None else str(uid)


def _refused(found: Found) -> list[str]:
    users = Counter(user(each.uid) for each in found.refused if each.exists and not each.why)
    if not users:
        return []
    names = ", ".join(sorted(users))
    many = count_of(sum(users.values()), "process")
    return folded(f"Not permitted to look into {many} of {names}{_how()}.", "  ")


def _failed(found: Found) -> Iterator[str]:
    """Those that something else than a lack of rights keeps from being looked into."""
    reasons = Counter(each.why for each in found.refused if each.exists and each.why)
    for why, times in reasons.items():
        yield from folded(f"Not looked into: {count_of(times, 'process')} that {why}.", "  ")


def _hidden(found: Found) -> list[str]:
    if not found.hides:
        return []
    return folded(
        f"Processes of other users are hidden here: /proc is mounted with hidepid{_how()}.", "  "
    )


def _how() -> str:
    """Even root may be kept from some, in a container for instance."""
    return ": run as root to see them" if getattr(os, "geteuid", int)() else ""
