"""Whose place a younger socket has taken: the program has connected anew, and kept the old one.

Who holds the accused: asked rarely, because it goes through the whole heap; then remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from closewait_guard._capture import SERIAL, SOCK, Registry
from closewait_guard._clock import Allowance, TimeLimit, now, wall
from closewait_guard._holders.find import (
    Holders,
    Roots,
    find_holders,
    find_holders_forward,
    instances_reached,
)
from closewait_guard._holders.libraries import owners_of_descriptors
from closewait_guard._holders.processes import processes_sharing
from closewait_guard._inspect import peer_of, record_of
from closewait_guard._judge import hint_for
from closewait_guard._libraries import PoolUse
from closewait_guard._live import instances_of, is_too_large
from closewait_guard.model import Finding, Frame, Observation, Origin, Verdict

__all__ = [
    "Explainer",
    "successors",
]


# Of all that were opened since, only the youngest are looked at.
_MOST = 200
# So much later at least: calls that follow each other at once do not take each other's place, and
# the end is dated by the kernel's ticks and by a look that was a while ago.
_PAUSE = 0.1


def successors(ended: Iterable[Observation], registry: Registry, wall: float) -> dict[int, int]:
    """By serial, the youngest that the same line has connected to the same peer since the end.

    Args:
        ended: Sockets that nobody uses any more.
        registry: Knows those that were opened since.
        wall: About the time of the look, in seconds since the epoch.
    """
    old = {
        seen.record.serial: (wall - seen.ended_for + _PAUSE, seen.peer, seen.record.site)
        for seen in ended
        if seen.record.origin is Origin.CREATED and seen.peer
    }
    if not old:
        return {}
    found: dict[int, int] = {}
    living = registry.living().stories.values()
    for story in nlargest(_MOST, living, key=itemgetter(SERIAL)):
        sock, record = story[SOCK](), record_of(story, registry.pid)
        peer, opened_at = peer_of(sock) if sock is not None else None, record.opened_at or 0.0
        for serial, (end, to, site) in old.items():
            is_younger = record.serial > serial and opened_at > end
            if is_younger and peer == to and record.site == site:
                found.setdefault(serial, record.serial)
    return found


_MOST_AT_ONCE = 20
_MOST_TIME = 0.4
# So much may be taken of the time to come, where a search in a small heap is made at once.
_MOST_AHEAD = 0.1
# In a large heap: how many are looked for on one way, in what time at least, and the share of it
# that goes to objects of native sockets.
_MOST_REACHED = 500
_LEAST, _MOST_LEAST = 0.005, 0.35
_OF_OWNERS = 0.3
_REFRESH_AFTER = 30.0

_Site = tuple[Verdict, Frame | None]


class _Told(NamedTuple):
    """What is remembered of one socket."""

    site: _Site
    holding: Holders
    at: float
    successor: int | None


_How = Callable[[list[Finding], TimeLimit], dict[int, Holders | None]]
_FAILED = Holders(has_failed=True)
_NOTHING = _Told((Verdict.OPEN, None), Holders(), 0.0, None)


class Explainer:
    """Adds to findings who holds them, and the hint that fits the holder."""

    def __init__(self, registry: Registry, allowance: Allowance) -> None:
        self._registry = registry
        self._allowance = allowance
        self._told: dict[int, _Told] = {}
        # What a search in a large heap must be given, after a shorter one has not sufficed.
        self._least = _LEAST
        # For how many of the accused nobody was looked for; others of their line may be known.
        self.unsearched = 0

    def time_to_search(self, *, paced: bool) -> TimeLimit:
        """How long may be searched now.

        Args:
            paced: The searches of a series must not take more than their share. Whoever asks for
                one report waits for it.
        """
        balance = self._allowance.balance(now())
        if not paced:
            return TimeLimit(_MOST_TIME)
        if is_too_large():
            return TimeLimit(balance if balance >= self._least else 0.0)
        return TimeLimit(_MOST_TIME if balance > -_MOST_AHEAD else 0.0)

    def explain(
        self,
        leaks: Iterable[Finding],
        pools: Mapping[int, PoolUse],
        limit: TimeLimit,
        *,
        everything: bool = False,
    ) -> tuple[Finding, ...]:
        """The leaks with their holders, as far as these are known or found in the time there is.

        Args:
            leaks: All that will be told; what is remembered of others is forgotten.
            pools: What is known of their places in pools, by serial.
            limit: The time there is.
            everything: Explain the innocent too, and each at once: it is the only time.
        """
        leaks = tuple(leaks)
        wanted = [leak for leak in leaks if everything or leak.is_leak]
        self._told = self._remembered(wanted)
        rests = self._allowance.balance(now()) < 0 and not everything
        self._search_all(self._asked(wanted, rests=rests), limit)
        told = self._told.copy()
        unknown = (leak for leak in wanted if self._is_unknown(leak))
        self.unsearched = sum(leak.observation.record.serial not in told for leak in unknown)
        return tuple(self._explained(leak, pools) for leak in leaks)

    def _search_all(self, asked: list[Finding], limit: TimeLimit) -> None:
        is_large = bool(asked) and is_too_large()
        size = _MOST_REACHED if is_large else _MOST_AT_ONCE
        search = self._reach if is_large else self._search_back
        at = wall()
        for start in range(0, len(asked), size):
            if limit.is_over():
                break
            self._search(asked[start : start + size], search, limit, at)

    @property
    def failed(self) -> int:
        """For how many of the leaks that were explained last the search has failed."""
        return sum(told.holding.has_failed for told in self._told.copy().values())

    def _remembered(self, leaks: list[Finding]) -> dict[int, _Told]:
        told = self._told
        serials = (leak.observation.record.serial for leak in leaks)
        return {serial: told[serial] for serial in serials if serial in told}

    def _asked(self, wanted: list[Finding], *, rests: bool) -> list[Finding]:
        """What to look for, with one of each site to begin with.

        While the search rests, only sites that are new are looked for.
        """
        sites = {told.site for told in self._told.copy().values()}
        new: list[Finding] = []
        others: list[Finding] = []
        for leak in wanted:
            if self._is_unknown(leak):
                (others if _site_of(leak) in sites else new).append(leak)
                sites.add(_site_of(leak))
        return new if rests else new + others

    def _is_unknown(self, leak: Finding) -> bool:
        if leak.verdict in (Verdict.DROPPED, Verdict.CLOSED_ELSEWHERE):
            return False
        told = self._told.get(leak.observation.record.serial)
        return told is None or told.site != _site_of(leak) or now() > told.at + _REFRESH_AFTER

    def _search(self, leaks: list[Finding], search: _How, limit: TimeLimit, wall: float) -> None:
        try:
            known = search(leaks, limit)
            observations = [leak.observation for leak in leaks]
            copies = _copies_of(observations)
            followed = successors(observations, self._registry, wall)
        except Exception:
            # Whatever it was, the leaks are told; and it is not tried again at once.
            serials = (leak.observation.record.serial for leak in leaks)
            known, copies, followed = dict.fromkeys(serials, _FAILED), {}, {}
        for leak in leaks:
            seen = leak.observation
            holding = known.get(seen.record.serial, Holders())
            successor = followed.get(seen.record.serial)
            if holding is not None:
                sentences = (*holding.sentences, *copies.get(seen.inode or 0, ()))
                holding = holding._replace(sentences=sentences)
                told = _Told(_site_of(leak), holding, now(), successor)
                self._told[seen.record.serial] = told

    def _search_back(self, leaks: list[Finding], limit: TimeLimit) -> dict[int, Holders | None]:
        """From each socket to what holds it, by questions to the whole heap."""
        roots = Roots()
        found, held = self._objects(leaks, lambda classes: instances_of(classes.values()))
        serials = [leak.observation.record.serial for leak in found]
        return dict(zip(serials, find_holders(held, limit.end, roots), strict=True))

    def _reach(self, leaks: list[Finding], limit: TimeLimit) -> dict[int, Holders | None]:
        """From what the program has by name to the sockets; None for what was not reached."""
        roots = Roots(with_values=True)
        part = limit.part(_OF_OWNERS)
        reached = partial(instances_reached, roots=roots, is_over=part.is_over)
        found, held = self._objects(leaks, reached)
        serials = [leak.observation.record.serial for leak in leaks]
        holding = find_holders_forward(held, roots, limit.is_over)
        known = dict.fromkeys(serials) | {
            leak.observation.record.serial: each for leak, each in zip(found, holding, strict=True)
        }
        has_found_all = None not in known.values()
        self._least = _LEAST if has_found_all else min(2 * self._least, _MOST_LEAST)
        return known

    def _objects(
        self, leaks: list[Finding], find: Callable[[dict[int, type]], Iterable[object]]
    ) -> tuple[list[Finding], list[object]]:
        """The objects that have the sockets, in a list that is the only thing to hold them."""
        without = {leak.observation.fd: leak for leak in leaks if self._socket_of(leak) is None}
        owners = owners_of_descriptors(without.keys(), find) if without else {}
        found = [without[fd] for fd in owners]
        held = list(owners.values())
        for leak in leaks:
            sock = self._socket_of(leak)
            if sock is not None:
                found.append(leak)
                held.append(sock)
        return found, held

    def _socket_of(self, leak: Finding) -> object | None:
        return self._registry.socket_of(leak.observation.fd, leak.observation.record.serial)

    def _explained(self, leak: Finding, pools: Mapping[int, PoolUse]) -> Finding:
        seen, verdict, severity = leak.observation, leak.verdict, leak.severity
        record = seen.record
        told = self._told.get(record.serial, _NOTHING)
        pool = pools.get(record.serial)
        if verdict is Verdict.CLOSED_ELSEWHERE:
            told, pool = _NOTHING._replace(holding=Holders((_thief_of(seen.fd),))), None
        sentences, owners, _ = told.holding
        if told.successor is not None:
            owners = (*owners, "reconnect")
        if pool is not None:
            sentences, owners = (*sentences, pool.sentence), (*owners, pool.owner)
        hint = hint_for(verdict, record.origin, seen.evidence, seen.connection, owners)
        # Not by replace(), which takes a tenth of a scan of those that are told in every report.
        return Finding(seen, verdict, severity, sentences, hint, told.successor)


def _site_of(leak: Finding) -> _Site:
    return leak.verdict, leak.observation.record.site


def _copies_of(seen: list[Observation]) -> dict[int, list[str]]:
    of_parent = any(each.record.origin is Origin.INHERITED for each in seen)
    return processes_sharing({each.inode for each in seen if each.inode}, of_parent=of_parent)


def _thief_of(fd: int) -> str:
    """What has the number of a stolen descriptor now."""
    try:
        what = Path(f"/proc/self/fd/{fd}").readlink()
    except OSError:
        return f"nobody: descriptor {fd} is closed"
    return f"nobody: descriptor {fd} is now {what}"
