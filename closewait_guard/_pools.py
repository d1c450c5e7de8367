"""Which connections a pool keeps idle, and which are checked out: asked of the pools themselves."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import islice
from typing import Any

from closewait_guard._heap import instances_of, loaded
from closewait_guard._objects import field, text_of
from closewait_guard._whereabouts import threads
from closewait_guard.integrations import POOLS, PoolKind, PoolUse
from closewait_guard.integrations._descriptor import descriptor_of
from closewait_guard.model import Observation

__all__ = ["Pools"]

_Pool = tuple[weakref.ref[Any], PoolKind]

# For pools that have no bound of their own.
_USUAL_BOUND = 100
_MOST_POOLS = 10_000


class Pools:
    """Knows the pools of the process by weak reference; looks for new ones when there is reason."""

    def __init__(self) -> None:
        self._pools: tuple[_Pool, ...] = ()
        self._in_none: frozenset[int] = frozenset()

    def uses(self, suspects: Iterable[Observation]) -> dict[int, PoolUse]:
        """What pools have to do with some sockets, by the serial of their records."""
        by_fd = {seen.fd: seen for seen in suspects}
        found = self._ask(by_fd)
        unknown = frozenset(by_fd[fd].record.serial for fd in by_fd.keys() - found.keys())
        if not unknown <= self._in_none:
            # Going through the heap would tell nothing new of what was in no pool the last time.
            self._pools = tuple(islice(_present(), _MOST_POOLS))
            found = self._ask(by_fd)
        self._in_none = frozenset(by_fd[fd].record.serial for fd in by_fd.keys() - found.keys())
        return {by_fd[fd].record.serial: use for fd, use in found.items()}

    def _ask(self, by_fd: Mapping[int, Observation]) -> dict[int, PoolUse]:
        uses: dict[int, PoolUse] = {}
        pools: Counter[_Place] = Counter()
        births: dict[_Place, set[str]] = defaultdict(set)
        for ref, kind in self._pools:
            pool = ref()
            found = {} if pool is None else _uses_of(pool, kind, by_fd.keys())
            uses |= found
            idle = [fd for fd, use in found.items() if use.is_idle]
            pools.update({(kind.library, by_fd[fd].peer) for fd in idle})
            for fd in idle:
                births[kind.library, by_fd[fd].peer].add(by_fd[fd].record.birth.thread)
        alive = {text_of(field(thread, "_name")) for thread in threads.copy().values()}
        for fd, use in uses.items():
            place = (use.library, by_fd[fd].peer)
            uses[fd] = _counted(use, pools[place], len(births[place] & alive))
        return uses


# A library, and the address that it is connected to.
_Place = tuple[str, str | None]


def _counted(use: PoolUse, pools: int, threads: int) -> PoolUse:
    """With the number of pools for one address: each thread may have its own, a call may not."""
    bound = _USUAL_BOUND if use.most is None else use.most
    return use._replace(pools=pools, is_surplus=pools > bound + threads)


def _present() -> Iterator[_Pool]:
    for kind in POOLS:
        for pool in instances_of(loaded(kind.classes)):
            yield weakref.ref(pool), kind


def _descriptors(things: Iterable[object], wanted: Set[int]) -> set[int]:
    found = {descriptor_of(thing) for thing in things}
    return {fd for fd in found if fd is not None} & wanted


def _uses_of(pool: Any, kind: PoolKind, fds: Set[int]) -> dict[int, PoolUse]:
    """Nothing, where the pool is closed or not made as its kind says."""
    try:
        idle, busy = _descriptors(kind.idle(pool), fds), _descriptors(kind.busy(pool), fds)
        if not idle and not busy:
            return {}
        name, most = kind.name(pool), kind.most(pool)
    except Exception:
        return {}
    return {fd: PoolUse(kind.library, name, fd in idle, most) for fd in idle | busy}
