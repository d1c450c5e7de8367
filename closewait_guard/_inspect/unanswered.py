"""Connections on which the peer acknowledges nothing of what was sent, as when it lost its power.

`poll` has no event for them: as long as the kernel tries again, which may be fifteen minutes, they
look healthy. So each socket is asked how much it has sent in vain. A peer that only reads and
never hears from us cannot be known to be gone, and is not looked for. A program that does not read,
or is stopped, is none of these: its system acknowledges what comes, or says that it has no room.
"""

from __future__ import annotations

import _socket
import math
from collections.abc import Collection, Container, Mapping
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


# How many are asked at each scan, by the time since the one before; at most so many, which takes
# about ten milliseconds. Each scan goes on where the one before has ended.
_AT_ONCE, _EACH_SECOND, _AT_MOST = 32, 2000, 5000
# What is asked at least so often is found before the kernel gives up.
_OFTEN = 300.0


class _Turn(NamedTuple):
    """How far the questions have come.

    Attributes:
        at: When a scan has asked last.
        place: How many of the present round are asked.
        began: When the present round began.
        since: All have been asked since.
    """

    at: float
    place: int
    began: float
    since: float


class _Seen(NamedTuple):
    """A connection that was found unanswered: since when at the latest, and when that was seen."""

    fd: int
    since: float
    at: float


class UnansweredSockets:
    """Finds them among the open sockets. Takes no lock: what it keeps is replaced as a whole.

    Attributes:
        notes: What the latest scan could not say.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._turn = _Turn(-math.inf, 0, now(), -math.inf)
        self._seen: Mapping[int, _Seen] = {}
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
        found, seen = dict[int, Unanswered](), dict[int, _Seen]()
        for fd in fds:
            if fd in ended:
                continue
            creation = creations[fd]
            unanswered = self._ask(fd, creation, is_detached=fd in open_sockets.detached)
            if unanswered is not None:
                serial = creation[SERIAL]
                seen[serial] = each = _update(fd, unanswered, before.get(serial))
                found[fd] = replace(unanswered, seconds=each.at - each.since)
        self._seen = seen
        return found

    def _choose(
        self, creations: Mapping[int, CreationTuple], *, everything: bool
    ) -> Collection[int]:
        """Whose turn it is, and those that were unanswered before."""
        at, turn, total = now(), self._turn, len(creations)
        number = int(min(_AT_MOST, _AT_ONCE + (at - turn.at) * _EACH_SECOND))
        self.notes = ()
        if everything or number >= total:
            self._turn = _Turn(at, 0, at, at)
            return creations.keys()
        end = turn.place + number
        fds = {*islice(creations, turn.place, end), *islice(creations, max(0, end - total))}
        if end >= total:
            turn = turn._replace(began=at, since=turn.began)
        self._turn = turn._replace(at=at, place=end % total)
        if at - turn.since > _OFTEN:
            self.notes = (
                f"whether the peers of {pluralize(total - number, 'socket')} acknowledge what is "
                "sent to them: a later scan asks",
            )
        return fds.union(each.fd for each in self._seen.values() if each.fd in creations)

    def _ask(self, fd: int, creation: CreationTuple, *, is_detached: bool) -> Unanswered | None:
        """None also of one that is closed by now."""
        if is_detached:
            return self._ask_descriptor(fd) if unsent(fd) else None
        with Probing(creation):
            return self._ask_object(fd, creation[SOCK]())

    def _ask_object(self, fd: int, sock: _socket.socket | None) -> Unanswered | None:
        if sock is None or not self._probe.has_unsent(sock):
            return None
        return self._probe.unanswered(sock) if _socket.socket.fileno(sock) == fd else None

    def _ask_descriptor(self, fd: int) -> Unanswered | None:
        try:
            with duplicate_fd(fd) as sock:
                return self._probe.unanswered(sock)
        except Exception as error:
            refusals.note(error)
            return None

    def after_fork(self) -> None:
        """In the child: nothing is known of its own."""
        self._seen, self.notes = {}, ()


def _update(fd: int, unanswered: Unanswered, before: _Seen | None) -> _Seen:
    """Since when it is, by what the kernel says and the scan before has seen."""
    at = now()
    since = at - unanswered.seconds
    if before is not None and at - unanswered.heard_for <= before.at:
        # Nothing has come since then.
        since = min(since, before.since)
    return _Seen(fd, since, at)
