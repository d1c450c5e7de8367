"""Who holds the accused: asked rarely, because it goes through the whole heap; then remembered."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from closewait_guard._hints import hint_for
from closewait_guard._holders import Holding, Roots, holdings
from closewait_guard._owners import owners_of
from closewait_guard._registry import Registry
from closewait_guard._relatives import other_holders
from closewait_guard._succession import successors
from closewait_guard.integrations import PoolUse
from closewait_guard.model import Frame, Leak, Observation, Origin, Verdict

__all__ = ["Explainer"]

_MOST_AT_ONCE = 20
_MOST_TIME = 0.4
# The share of the time that searching may take, but for leaks of a kind that is new.
_SHARE = 0.01
_REFRESH_AFTER = 30.0

_Site = tuple[Verdict, Frame | None]


class _Told(NamedTuple):
    """What is remembered of one socket."""

    site: _Site
    holding: Holding
    at: float
    successor: int | None


_NOTHING = _Told((Verdict.OPEN, None), Holding(), 0.0, None)


class Explainer:
    """Adds to leaks who holds them, and the hint that fits the holder."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._told: dict[int, _Told] = {}
        self._rests_until = 0.0

    def explain(
        self, leaks: Iterable[Leak], pools: Mapping[int, PoolUse], *, everything: bool = False
    ) -> tuple[Leak, ...]:
        """The leaks with their holders, as far as these are known or found in the time there is.

        Args:
            leaks: All that will be told; what is remembered of others is forgotten.
            pools: What is known of their places in pools, by serial.
            everything: Explain the innocent too, and each at once: it is the only time.
        """
        leaks = tuple(leaks)
        wanted = [leak for leak in leaks if everything or leak.accused]
        now, wall = time.monotonic(), time.time()
        self._told = self._remembered(wanted)
        rests = now < self._rests_until and not everything
        batches = self._batches(wanted, now, rests=rests)
        while batches and time.monotonic() < now + _MOST_TIME:
            self._search(batches.pop(), now + _MOST_TIME, wall)
        took = time.monotonic() - now
        self._rests_until = max(self._rests_until, now + took / _SHARE)
        return tuple(self._explained(leak, pools) for leak in leaks)

    @property
    def failed(self) -> int:
        """For how many of the leaks that were explained last the search has failed."""
        return sum(told.holding.has_failed for told in self._told.values())

    def _remembered(self, leaks: list[Leak]) -> dict[int, _Told]:
        told = self._told
        serials = (leak.observation.record.serial for leak in leaks)
        return {serial: told[serial] for serial in serials if serial in told}

    def _batches(self, wanted: list[Leak], now: float, *, rests: bool) -> list[list[Leak]]:
        """What to look for: last the batch to begin with, in which each site has its turn.

        While the search rests, only sites that are new are looked for.
        """
        sites = {told.site for told in self._told.values()}
        new: list[Leak] = []
        others: list[Leak] = []
        for leak in wanted:
            if self._is_unknown(leak, now):
                (others if _site_of(leak) in sites else new).append(leak)
                sites.add(_site_of(leak))
        asked = new if rests else new + others
        starts = range(0, len(asked), _MOST_AT_ONCE)
        return [asked[start : start + _MOST_AT_ONCE] for start in starts][::-1]

    def _is_unknown(self, leak: Leak, now: float) -> bool:
        if leak.verdict in (Verdict.DROPPED, Verdict.STOLEN):
            return False
        told = self._told.get(leak.observation.record.serial)
        return told is None or told.site != _site_of(leak) or now > told.at + _REFRESH_AFTER

    def _search(self, leaks: list[Leak], deadline: float, wall: float) -> None:
        try:
            self._look_for(leaks, deadline, wall)
        except Exception:
            # Whatever it was, the leaks are told; and it is not tried again at once.
            now, failed = time.monotonic(), Holding(has_failed=True)
            for leak in leaks:
                told = _Told(_site_of(leak), failed, now, None)
                self._told[leak.observation.record.serial] = told

    def _look_for(self, leaks: list[Leak], deadline: float, wall: float) -> None:
        roots = Roots()
        found, held = self._objects(leaks)
        serials = [leak.observation.record.serial for leak in found]
        known = dict(zip(serials, holdings(held, deadline, roots), strict=True))
        observations = [leak.observation for leak in leaks]
        copies = _copies_of(observations)
        followed = successors(observations, self._registry, wall)
        now = time.monotonic()
        for leak in leaks:
            seen = leak.observation
            holding = known.get(seen.record.serial, Holding())
            sentences = (*holding.sentences, *copies.get(seen.inode or 0, ()))
            holding = holding._replace(sentences=sentences)
            successor = followed.get(seen.record.serial)
            self._told[seen.record.serial] = _Told(_site_of(leak), holding, now, successor)

    def _objects(self, leaks: list[Leak]) -> tuple[list[Leak], list[object]]:
        """The objects that have the sockets, in a list that is the only thing to hold them."""
        without = {leak.observation.fd: leak for leak in leaks if self._socket_of(leak) is None}
        owners = owners_of(without.keys()) if without else {}
        found = [without[fd] for fd in owners]
        held = list(owners.values())
        for leak in leaks:
            sock = self._socket_of(leak)
            if sock is not None:
                found.append(leak)
                held.append(sock)
        return found, held

    def _socket_of(self, leak: Leak) -> object | None:
        return self._registry.socket_of(leak.observation.fd, leak.observation.record.serial)

    def _explained(self, leak: Leak, pools: Mapping[int, PoolUse]) -> Leak:
        if leak.verdict is Verdict.STOLEN:
            return replace(leak, holders=(_thief_of(leak.observation.fd),))
        record = leak.observation.record
        told = self._told.get(record.serial, _NOTHING)
        pool = pools.get(record.serial)
        if told is _NOTHING and pool is None:
            return leak
        sentences, owners, _ = told.holding
        if told.successor is not None:
            owners = (*owners, "reconnect")
        if pool is not None:
            sentences, owners = (*sentences, pool.sentence), (*owners, pool.owner)
        hint = hint_for(leak.verdict, record.origin, leak.observation.evidence, owners)
        # Not by replace(), which takes a tenth of a scan of those that are told in every report.
        seen, verdict, severity = leak.observation, leak.verdict, leak.severity
        return Leak(seen, verdict, severity, sentences, hint, told.successor)


def _site_of(leak: Leak) -> _Site:
    return leak.verdict, leak.observation.record.site


def _copies_of(seen: list[Observation]) -> dict[int, list[str]]:
    of_parent = any(each.record.origin is Origin.INHERITED for each in seen)
    return other_holders({each.inode for each in seen if each.inode}, of_parent=of_parent)


def _thief_of(fd: int) -> str:
    """What has the number of a stolen descriptor now."""
    try:
        what = Path(f"/proc/self/fd/{fd}").readlink()
    except OSError:
        return f"nobody: descriptor {fd} is closed"
    return f"nobody: descriptor {fd} is now {what}"
