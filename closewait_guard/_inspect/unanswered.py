"""Connections on which the peer acknowledges nothing of what was sent, as when it lost its power.

`poll` has no event for them: as long as the kernel tries again, which may be fifteen minutes, they
look healthy. So each socket is asked how much it has sent in vain. A peer that only reads and
never hears from us cannot be known to be gone, and is not looked for. A program that does not read,
or is stopped, is none of these: its system acknowledges what comes, or says that it has no room.
"""

from __future__ import annotations

import _socket
import math
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from closewait_guard._capture import SERIAL, SOCK, CreationTuple, OpenSockets, Probing
from closewait_guard._clock import now
from closewait_guard._descriptors import unsent
from closewait_guard._format import pluralize
from closewait_guard._inspect.probe import Probe, duplicate_fd
from closewait_guard._interruptions import refusals
from closewait_guard.model import Unanswered

__all__ = [
    "UnansweredSockets",
]


# How many a scan asks of a round, by the time since one has asked before; at most so many, which
# takes about ten milliseconds. The next scan goes on where this one has ended.
_AT_ONCE, _EACH_SECOND, _AT_MOST = 32, 2000, 5000
# What is asked at least so often is found before the kernel gives up.
_OFTEN = 300.0


class _Round(NamedTuple):
    """How far a round of questions to all has come.

    Attributes:
        at: When a scan has asked last.
        place: How many were asked; 0 when all were.
        began: When it began.
        since: All have been asked since: when the round before began.
    """

    at: float
    place: int
    began: float
    since: float


_NO_ROUND = _Round(-math.inf, 0, -math.inf, -math.inf)


class _Seen(NamedTuple):
    """A connection that was found unanswered: since when at the latest, and when that was seen."""

    fd: int
    since: float
    at: float


class UnansweredSockets:
    """Finds them among the open sockets. Takes no lock: what it keeps is replaced as a whole.

    A socket of which nothing is unacknowledged can be unanswered for the grace time only after that
    time: so long it is not asked again. All others are, at each scan.

    Args:
        probe: Asks them.
        grace: What is unanswered for a shorter time is not reported.

    Attributes:
        notes: What the latest scan could not say.
    """

    def __init__(self, probe: Probe, grace: float) -> None:
        self._probe = probe
        self._pause = min(grace, _OFTEN / 2)
        self._round = _NO_ROUND
        self._seen: Mapping[int, _Seen] = {}
        self._unsent: Collection[int] = ()
        self.notes: tuple[str, ...] = ()

    def find(
        self, open_sockets: OpenSockets, ended: Container[int], *, everything: bool
    ) -> dict[int, Unanswered]:
        """By descriptor, what is unanswered.

        Args:
            open_sockets: All that are open.
            ended: Those that something has happened to, such as the peer's end: not asked.
            everything: Ask all of them, however many they are.
        """
        creations, before = open_sockets.creations, self._seen
        fds = self._choose(creations, everything=everything)
        found, seen, unsent = dict[int, Unanswered](), dict[int, _Seen](), list[int]()
        for fd in fds:
            if fd in ended:
                continue
            creation = creations[fd]
            is_detached = fd in open_sockets.detached
            has_unsent, unanswered = self._ask(fd, creation, is_detached=is_detached)
            if has_unsent:
                unsent.append(fd)
            if unanswered is not None:
                serial = creation[SERIAL]
                seen[serial] = each = _update(fd, unanswered, before.get(serial))
                found[fd] = replace(unanswered, seconds=each.at - each.since)
        self._seen, self._unsent = seen, unsent
        return found

    def _choose(
        self, creations: Mapping[int, CreationTuple], *, everything: bool
    ) -> Collection[int]:
        """Whose turn it is, and those of which something was unacknowledged."""
        at, self.notes = now(), ()
        if everything:
            self._round = _Round(at, 0, at, at)
            return creations.keys()
        again = {*islice(self._unsent, _AT_MOST), *(each.fd for each in self._seen.values())}
        chosen = {fd for fd in again if fd in creations}
        if self._round.place or at - self._round.since >= self._pause:
            chosen.update(self._continue_round(creations, at))
        return chosen

    def _continue_round(self, creations: Mapping[int, CreationTuple], at: float) -> Iterable[int]:
        before, total = self._round, len(creations)
        number = int(min(_AT_MOST, _AT_ONCE + (at - before.at) * _EACH_SECOND))
        began, end = before.began if before.place else at, before.place + number
        if end >= total:
            self._round = _Round(at, 0, began, began)
        else:
            self._round = _Round(at, end, began, before.since)
            if at - before.since > _OFTEN:
                self.notes = (
                    f"whether the peers of {pluralize(total - number, 'socket')} acknowledge what "
                    "is sent to them: a later scan asks",
                )
        return islice(creations, before.place, end)

    def _ask(
        self, fd: int, creation: CreationTuple, *, is_detached: bool
    ) -> tuple[bool, Unanswered | None]:
        """Whether anything is unacknowledged, and unanswered. Not of one that is closed by now."""
        if is_detached:
            return (True, self._ask_descriptor(fd)) if unsent(fd) else (False, None)
        with Probing(creation):
            return self._ask_object(fd, creation[SOCK]())

    def _ask_object(self, fd: int, sock: _socket.socket | None) -> tuple[bool, Unanswered | None]:
        if sock is None or not self._probe.has_unsent(sock):
            return False, None
        return True, self._probe.unanswered(sock) if _socket.socket.fileno(sock) == fd else None

    def _ask_descriptor(self, fd: int) -> Unanswered | None:
        try:
            with duplicate_fd(fd) as sock:
                return self._probe.unanswered(sock)
        except Exception as error:
            refusals.note(error)
            return None

    def after_fork(self) -> None:
        """In the child: nothing is known of its own."""
        self._round, self._seen, self._unsent, self.notes = _NO_ROUND, {}, (), ()


def _update(fd: int, unanswered: Unanswered, before: _Seen | None) -> _Seen:
    """Since when it is, by what the kernel says and the scan before has seen."""
    at = now()
    since = at - unanswered.seconds
    if before is not None and at - unanswered.heard_for <= before.at:
        # Nothing has come since then.
        since = min(since, before.since)
    return _Seen(fd, since, at)
