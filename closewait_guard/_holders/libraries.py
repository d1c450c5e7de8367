"""Which connections a pool keeps idle, and which are checked out: asked of the pools themselves.

The objects that hold native sockets: who answers with a descriptor's number.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from itertools import islice
from typing import Any

from closewait_guard._capture import SOCKET, threads
from closewait_guard._clock import TimeLimit
from closewait_guard._holders.find import Roots, reachable_instances
from closewait_guard._libraries import OWNERS, POOLS, OwnerKind, PoolKind, PoolUse, descriptor_of
from closewait_guard._live import (
    derives_from,
    field,
    find_classes,
    instances_of,
    is_too_large,
    kinds_of,
    text_of,
)
from closewait_guard.model import Observation

__all__ = [
    "Pools",
    "owners_of_descriptors",
]


_Pool = tuple[weakref.ref[Any], PoolKind]

# For pools that have no bound of their own.
_USUAL_BOUND = 100
_MOST_POOLS = 10_000


class Pools:
    """Knows the pools of the process by weak reference; looks for new ones when there is reason."""

    def __init__(self) -> None:
        self._pools: tuple[_Pool, ...] = ()
        self._in_none: frozenset[int] = frozenset()

    def uses(self, suspects: Iterable[Observation], limit: TimeLimit) -> dict[int, PoolUse]:
        """What pools have to do with some sockets, by the serial of their records.

        Args:
            suspects: The sockets.
            limit: How long to look for new pools where the heap is large.
        """
        by_fd = {seen.fd: seen for seen in suspects}
        found = self._ask(by_fd)
        unknown = frozenset(by_fd[fd].record.serial for fd in by_fd.keys() - found.keys())
        is_asked_for = not unknown <= self._in_none
        if is_asked_for and is_too_large() and limit.is_over():
            # Another time: what is not known yet counts as in none then, too.
            unknown &= self._in_none
        elif is_asked_for:
            # Going through the heap would tell nothing new of what was in no pool the last time.
            self._pools = self._present(limit)
            found = self._ask(by_fd)
            unknown = frozenset(by_fd[fd].record.serial for fd in by_fd.keys() - found.keys())
        self._in_none = unknown
        return {by_fd[fd].record.serial: use for fd, use in found.items()}

    def _present(self, limit: TimeLimit) -> tuple[_Pool, ...]:
        kinds = _kinds_by_class()
        if not is_too_large():
            found: Iterable[object] = instances_of([cls for cls, _ in kinds.values()])
            known: dict[int, _Pool] = {}
        else:
            known = {id(pool): each for each in self._pools if (pool := each[0]()) is not None}
            classes = {key: cls for key, (cls, _) in kinds.items()}
            roots = Roots(with_values=True) if kinds else None
            found = () if roots is None else reachable_instances(classes, roots, limit.is_over)
        for pool in islice(found, _MOST_POOLS):
            known[id(pool)] = weakref.ref(pool), kinds[id(type(pool))][1]
        return tuple(known.values())

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
                births[kind.library, by_fd[fd].peer].add(by_fd[fd].record.opener.thread)
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


def _kinds_by_class() -> dict[int, tuple[type, PoolKind]]:
    """The classes of pools that are loaded, by identity, with what is known of them."""
    loaded = find_classes(name for kind in POOLS for name in kind.classes)
    return {
        id(cls): (cls, kind)
        for kind in POOLS
        for name in kind.classes
        if name in loaded
        for cls in kinds_of(loaded[name])
    }


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


def owners_of_descriptors(
    fds: Set[int], find: Callable[[dict[int, type]], Iterable[object]]
) -> dict[int, Any]:
    """Objects by descriptor. Whoever asks lets go of them soon.

    Args:
        fds: The descriptors.
        find: The objects of some classes, which are given by their identity.
    """
    kinds = _owner_classes()
    found: dict[int, Any] = {}
    for owner in find({key: cls for key, (cls, _) in kinds.items()}) if fds and kinds else ():
        # It may be closed, or busy with something that does not allow to be asked.
        with contextlib.suppress(Exception):
            descriptors = set(kinds[id(type(owner))][1].descriptors(owner))
            found |= dict.fromkeys(descriptors & (fds - found.keys()), owner)
        if not fds - found.keys():
            break
    return found


def _owner_classes() -> dict[int, tuple[type, OwnerKind]]:
    """The classes of owners that are loaded, by identity, with what is known of them."""
    loaded = find_classes(name for kind in OWNERS for name in kind.classes)
    return {
        id(cls): (cls, kind)
        for kind in reversed(OWNERS)
        for name in kind.classes
        if name in loaded
        for cls in kinds_of(loaded[name])
        if not derives_from(cls, [SOCKET])
    }
