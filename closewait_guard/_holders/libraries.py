"""What objects of foreign libraries say: pools of their connections, owners of descriptors."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from closewait_guard import _libraries
from closewait_guard._capture import OpenCheckout
from closewait_guard._clock import TimeLimit, now, thread_time
from closewait_guard._cpython import (
    FINALIZER_ENTRIES,
    LOOP_CLOSED,
    THREAD_NAME,
    has_gil,
    threads,
)
from closewait_guard._format import pluralize
from closewait_guard._holders.references import find_unused, reachable_instances
from closewait_guard._holders.roots import Roots
from closewait_guard._libraries import (
    CheckoutKind,
    HandleClasses,
    Library,
    PoolKind,
    PoolUse,
    descriptor_of,
    handle_classes,
    nothing,
)
from closewait_guard._live import (
    field,
    find_classes,
    instances_of,
    is_too_large,
    kinds_of,
    loaded,
    plain_of,
    text_of,
)
from closewait_guard.model import Frame, Observation, Origin, SocketRecord, Verdict

__all__ = [
    "PoolCount",
    "PoolCounter",
    "Pools",
    "all_instances",
    "calls_of_libraries",
    "hints_of_libraries",
    "idle_pools",
    "owners_of_descriptors",
]


# A reference to a pool, the library that it is of, and what is known of it.
_Pool = tuple[weakref.ref[Any], Library, PoolKind]
# Pools that could be one: their library, name, purpose and address, and the line that connected.
_Target = tuple[str, str, frozenset[object], str | None, Frame | None]
# What may need a pool of its own: a thread, and an event loop by identity.
_User = tuple[str, int | None]
# By the identity of a class, which a class with an odd metaclass has too.
_PoolClasses = Mapping[int, tuple[type, Library, PoolKind]]

# Besides one for each thread and event loop: clients of one line with different settings.
_FEW_POOLS = 4
_MAX_POOLS = 10_000
_NOT_ALL_ASKED = "what waits in pools: not all of them were found or asked, "
_TOO_MANY, _NO_TIME = f"there are {_MAX_POOLS:,} or more", "for lack of time"
_TOO_LARGE = "the program has too many objects"
# The shares of the time for searching that go to new pools, and to what can use those known.
_SHARE_OF_POOLS = _SHARE_OF_USES = 0.3
# How many pools one search for uses may have, and the share of all time that searches may take.
_MAX_AT_ONCE = 20
_SHARE_OF_TIME = 0.01
# And the share that finding pools to count may take.
_SHARE_OF_COUNTING = 0.002


class Pools:
    """Knows the pools of the process by weak reference; looks for new ones when there is reason.

    Attributes:
        notes: What could not be found out the last time; the `failures` are those for an error.
    """

    def __init__(self) -> None:
        self._pools: tuple[_Pool, ...] = ()
        self._in_no_pool: frozenset[int] = frozenset()
        # By the identity of the reference to a pool.
        self._answers: dict[int, _UseAnswer] = {}
        self.notes: tuple[str, ...] = ()
        self.failures: tuple[str, ...] = ()

    def uses(
        self, suspects: Iterable[Observation], limit: TimeLimit, *, afresh: bool = False
    ) -> dict[int, PoolUse]:
        """What pools have to do with some sockets, by the serial of their records.

        Args:
            suspects: The sockets.
            limit: How long to look for new pools where the heap is large, and for what uses them.
            afresh: Search again for what uses them, however lately that was done.
        """
        self.notes = self.failures = ()
        if not has_gil():
            return {}
        try:
            return self._uses(suspects, limit, afresh=afresh)
        except Exception:
            self.notes = self.failures = ("what waits in pools: asking them has failed",)
            return {}

    def _uses(
        self, suspects: Iterable[Observation], limit: TimeLimit, *, afresh: bool
    ) -> dict[int, PoolUse]:
        new, uses = limit.part(_SHARE_OF_POOLS), limit.part(_SHARE_OF_USES)
        by_fd = {seen.fd: seen for seen in suspects}
        found = self._ask_pools(by_fd)
        unknown = frozenset(by_fd[fd].record.serial for fd in by_fd.keys() - found.keys())
        has_new = not unknown <= self._in_no_pool
        if has_new and is_too_large() and new.is_over():
            # Another time: what is not known yet counts as in none then, too.
            unknown &= self._in_no_pool
            self.notes = (_NOT_ALL_ASKED + _NO_TIME,)
        elif has_new:
            # Of what was in no pool the last time, the heap would show nothing new.
            self._pools = self._find_pools(new)
            found = self._ask_pools(by_fd)
            unknown = frozenset(by_fd[fd].record.serial for fd in by_fd.keys() - found.keys())
        self._in_no_pool = unknown
        excuses = [pool for use, pool in found.values() if use.is_excuse]
        out_of_use = self._find_out_of_use(excuses, uses, afresh=afresh)
        return {
            by_fd[fd].record.serial: use._replace(
                is_out_of_use=bool(out_of_use.get(id(pool[0]))),
                # A check excuses nothing by what it does not know.
                is_in_doubt=afresh and out_of_use.get(id(pool[0]), False) is None,
            )
            for fd, (use, pool) in found.items()
        }

    def _find_pools(self, limit: TimeLimit) -> tuple[_Pool, ...]:
        classes, has_found_all = _pool_classes(), True
        if not classes or not is_too_large():
            found: list[object] = instances_of([cls for cls, *_ in classes.values()])
            known: dict[int, _Pool] = {}
        else:
            known = {id(pool): each for each in self._pools if (pool := each[0]()) is not None}
            wanted = {key: cls for key, (cls, *_) in classes.items()}
            roots = Roots(with_values=True)
            found, has_found_all = reachable_instances(wanted, roots, limit.is_over)
        for pool in islice(found, _MAX_POOLS):
            _, library, kind = classes[id(type(pool))]
            known[id(pool)] = weakref.ref(pool), library, kind
        if len(known) >= _MAX_POOLS:
            self.notes = (_NOT_ALL_ASKED + _TOO_MANY,)
        elif not has_found_all:
            self.notes = (_NOT_ALL_ASKED + (_NO_TIME if limit.is_over() else _TOO_LARGE),)
        return tuple(known.values())

    def _find_out_of_use(
        self, pools: Iterable[_Pool], limit: TimeLimit, *, afresh: bool
    ) -> dict[int, bool | None]:
        """By the identity of their references: whether nothing can use some pools any more.

        None where that is not known. How long an answer is believed depends on what it has cost.
        """
        asked = {id(pool[0]): pool for pool in pools}
        known = {key: each for key, each in self._answers.items() if key in asked}
        wanted = [
            pool
            for key, pool in asked.items()
            if afresh or key not in known or known[key].until < now()
        ]
        for start in range(0, len(wanted), _MAX_AT_ONCE):
            # Who checks waits for the answer, so other threads may stand still for longer.
            if limit.is_over() or (is_too_large() and not afresh):
                break
            with contextlib.suppress(Exception):
                known |= _search_uses(wanted[start : start + _MAX_AT_ONCE], limit)
        self._answers = known
        found = {key: known[key].is_out_of_use if key in known else None for key in asked}
        unknown = sum(each is None for each in found.values())
        if unknown:
            which = pluralize(unknown, "pool")
            self.notes += (f"whether {which} can still be used (no time to search for that yet)",)
        return found

    def _ask_pools(self, by_fd: Mapping[int, Observation]) -> dict[int, tuple[PoolUse, _Pool]]:
        uses: dict[int, PoolUse] = {}
        pool_of: dict[int, _Pool] = {}
        targets: dict[int, _Target] = {}
        pools: Counter[_Target] = Counter()
        users: dict[_Target, set[_User]] = defaultdict(set)
        handles = (
            handle_classes(_libraries.LIBRARIES, with_inner=True) if self._pools and by_fd else {}
        )
        # Several may have one name.
        alive = Counter(text_of(field(each, THREAD_NAME)) for each in threads.copy().values())
        for ref, library, kind in self._pools:
            pool = ref()
            found = {} if pool is None else _uses_of(pool, library, kind, by_fd.keys(), handles)
            purpose = _purpose_of(pool, kind) if found else frozenset[object]()
            uses |= {fd: use for fd, (use, _) in found.items()}
            targets |= {fd: _target_of(use, purpose, by_fd[fd]) for fd, (use, _) in found.items()}
            pool_of |= dict.fromkeys(found, (ref, library, kind))
            counts = not kind.is_of_thread
            idle = {fd: loop for fd, (use, loop) in found.items() if use.is_idle and counts}
            pools.update({targets[fd] for fd in idle})
            for fd, loop in idle.items():
                thread = by_fd[fd].record.opener.thread
                # If no thread is known, each counts as alive.
                if (not alive or thread in alive) and field(loop, LOOP_CLOSED) is not True:
                    user = thread, None if loop is None else id(loop)
                    users[targets[fd]].add(user)
        for fd, use in uses.items():
            target = targets[fd]
            made, needed = pools[target], sum(alive[name] or 1 for name, _ in users[target])
            too_many = made > _FEW_POOLS + needed
            uses[fd] = use._replace(pools=made, users=needed, too_many_pools=too_many)
        return {fd: (use, pool_of[fd]) for fd, use in uses.items()}


class _UseAnswer(NamedTuple):
    """Whether nothing can use a pool any more, None if unknown, and until when that is believed."""

    pool: weakref.ref[Any]
    is_out_of_use: bool | None
    until: float


def _search_uses(pools: Sequence[_Pool], limit: TimeLimit) -> dict[int, _UseAnswer]:
    """By the identity of their references: whether anything can still use some pools."""
    began = thread_time()
    roots = Roots()
    kept_by = loaded(name for *_, kind in pools for name in kind.kept_by)
    # No variable here may hold a pool: it would count as something that uses it.
    things = [ref() for ref, *_ in pools]
    refs = [ref for (ref, *_), thing in zip(pools, things, strict=True) if thing is not None]
    things = [thing for thing in things if thing is not None]
    unused = find_unused(things, roots, limit.end, FINALIZER_ENTRIES, kept_by)
    until = now() + (thread_time() - began) / _SHARE_OF_TIME
    return {id(ref): _UseAnswer(ref, unused[place], until) for place, ref in enumerate(refs)}


class PoolCount(NamedTuple):
    """How many connections a pool has, and what waits. Plain data: it keeps nothing alive.

    Attributes:
        library: The name of the library.
        name: The pool, as its users would call it.
        waiting: How many threads, tasks or requests wait for one.
        max_size: How many there may be; None where there is no bound.
    """

    library: str
    name: str
    used: int
    idle: int
    waiting: int
    max_size: int | None


class PoolCounter:
    """Counts the connections of the pools of the process, which it knows by weak reference."""

    def __init__(self) -> None:
        self._pools: dict[int, weakref.ref[Any]] = {}
        self._paused_until = 0.0

    def count(self, checkouts: Sequence[OpenCheckout]) -> tuple[PoolCount, ...]:
        """The pools that are found, and those of the connections that are out."""
        try:
            return tuple(self._count(checkouts))
        except Exception:
            return ()

    def _count(self, checkouts: Sequence[OpenCheckout]) -> Iterator[PoolCount]:
        classes = {
            key: each for key, each in _pool_classes().items() if each[2].idle is not nothing
        }
        if classes and now() >= self._paused_until and has_gil() and not is_too_large():
            began = now()
            found = instances_of([cls for cls, *_ in classes.values()])
            self._pools = {id(pool): weakref.ref(pool) for pool in islice(found, _MAX_POOLS)}
            self._paused_until = now() + (now() - began) / _SHARE_OF_COUNTING
        taken = Counter(id(each.pool) for each in checkouts)
        pools = {id(each.pool): each.pool for each in checkouts}
        pools |= {key: pool for key, ref in self._pools.items() if (pool := ref()) is not None}
        kinds = {id(each.pool): each.kind for each in checkouts}
        handles = handle_classes(_libraries.LIBRARIES, with_inner=True) if pools else {}
        for key, pool in pools.items():
            # One may be in the middle of something: it is counted the next time.
            with contextlib.suppress(Exception):
                if id(type(pool)) in classes:
                    _, library, kind = classes[id(type(pool))]
                    used = max(taken[key], _count_open(kind.checked_out(pool), handles))
                    idle = _count_open(kind.idle(pool), handles)
                    yield _pool_count(pool, kind, library.name, used, idle)
                else:
                    yield _pool_count(pool, kinds[key], kinds[key].library, taken[key], 0)


def _pool_count(
    pool: object, kind: PoolKind | CheckoutKind, library: str, used: int, idle: int
) -> PoolCount:
    waiting = sum(1 for _ in kind.waiting(pool))
    return PoolCount(library, kind.name(pool), used, idle, waiting, kind.max_size(pool))


def _count_open(connections: Iterable[object], handles: HandleClasses) -> int:
    fds = (descriptor_of(each, handles)[0] for each in connections)
    return len({fd for fd in fds if fd is not None and fd >= 0})


def _target_of(use: PoolUse, purpose: frozenset[object], seen: Observation) -> _Target:
    return use.library, use.name, purpose, seen.peer, seen.record.site


def _purpose_of(pool: Any, kind: PoolKind) -> frozenset[object]:
    with contextlib.suppress(Exception):
        return plain_of(kind.purpose(pool))
    return frozenset()


def _pool_classes() -> _PoolClasses:
    """The classes of pools that are loaded, with what is known of them."""
    kinds = [(library, kind) for library in _libraries.LIBRARIES for kind in library.pools]
    loaded = find_classes(name for _, kind in kinds for name in kind.classes)
    return {
        id(cls): (cls, library, kind)
        for library, kind in kinds
        for name in kind.classes
        if name in loaded
        for cls in kinds_of(loaded[name])
    }


def _uses_of(
    pool: Any, library: Library, kind: PoolKind, fds: Set[int], handles: HandleClasses
) -> dict[int, tuple[PoolUse, Any]]:
    """How the pool uses each descriptor, and the event loop that drives its connection.

    Nothing, where the pool is closed or not made as its kind says.
    """
    try:
        idle = dict(descriptor_of(each, handles) for each in kind.idle(pool))
        checked_out = dict(descriptor_of(each, handles) for each in kind.checked_out(pool))
        loops = {fd: loop for fd, loop in (checked_out | idle).items() if fd in fds}
        if not loops:
            return {}
        name, max_size = kind.name(pool), kind.max_size(pool)
    except Exception:
        return {}
    return {
        fd: (PoolUse(library.name, name, fd in idle, max_size), loop)
        for fd, loop in loops.items()
        if fd is not None
    }


def all_instances(classes: dict[int, type]) -> Iterable[object]:
    return instances_of(classes.values())


def idle_pools(observations: Iterable[Observation]) -> dict[int, tuple[set[int], PoolKind]]:
    """By the identity of each pool: the serials of the sockets that wait in it, and its kind."""
    by_fd = {seen.fd: seen.record.serial for seen in observations}
    classes, handles = _pool_classes(), handle_classes(_libraries.LIBRARIES, with_inner=True)
    found: dict[int, tuple[set[int], PoolKind]] = {}
    for pool in instances_of([cls for cls, *_ in classes.values()]) if by_fd else ():
        _, library, kind = classes[id(type(pool))]
        uses = _uses_of(pool, library, kind, by_fd.keys(), handles)
        if serials := {by_fd[fd] for fd, (use, _) in uses.items() if use.is_idle}:
            found[id(pool)] = serials, kind
    return found


def owners_of_descriptors(
    fds: Set[int], find: Callable[[dict[int, type]], Iterable[object]] = all_instances
) -> dict[int, Any]:
    """Objects by descriptor. The caller lets go of them soon.

    Args:
        fds: The descriptors.
        find: The objects of some classes, which are given by their identity.
    """
    classes = handle_classes(_libraries.LIBRARIES)
    found: dict[int, Any] = {}
    for owner in find({key: cls for key, (cls, _) in classes.items()}) if fds and classes else ():
        # It may be closed, or busy with something that does not allow to be asked.
        with contextlib.suppress(Exception):
            descriptors = set(classes[id(type(owner))][1].descriptors(owner))
            found |= dict.fromkeys(descriptors & (fds - found.keys()), owner)
        if not fds - found.keys():
            break
    return found


def calls_of_libraries(record: SocketRecord) -> tuple[str, ...]:
    """The calls between the program's line and the socket, outermost first, as types are named."""
    stack = record.blamed.stack
    inner = stack if record.site is None else stack[: stack.index(record.site)]
    return tuple(f"{frame.module}.{frame.function}" for frame in reversed(inner))


def hints_of_libraries() -> Callable[[Verdict, Origin, tuple[str, ...]], str]:
    """What finds the sentence for a verdict, an origin and holders; empty where none fits."""
    hints = tuple(hint for library in _libraries.LIBRARIES for hint in library.hints)

    @lru_cache(4096)
    def find(verdict: Verdict, origin: Origin, holders: tuple[str, ...]) -> str:
        return next((hint.sentence for hint in hints if hint.fits(verdict, origin, holders)), "")

    return find
