"""Questions to the garbage collector, asked so that no other thread can come to harm.

A tuple that a thread is filling from an iterator is in the heap already; if anything else refers to
it when it is finished, the interpreter raises SystemError there. As threads are switched between
bytecodes only, each answer is rid of its tuples within a single call into C: that is why there are
iterators of iterators where a loop would read better. What the heap holds otherwise may be touched,
but not compared: a class may have any `__eq__` and no `__hash__`; its identity stands for it.

Without the GIL, threads are not switched but run at once: there all answers are empty.
"""

from __future__ import annotations

import gc
import operator
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, compress, islice, repeat, starmap, tee
from typing import Any

from closewait_guard._clock import thread_time
from closewait_guard._cpython import has_gil, weak_reference
from closewait_guard._live.objects import HEAP_TYPE, find_classes, flags_of

__all__ = [
    "instances_of",
    "is_too_large",
    "kinds_of",
    "loaded",
    "referrers",
    "referrers_through_tuples",
    "weak_instances_of",
    "without_collection",
]


_MAX_TUPLES = 50
_MIN_AT_ONCE = 8

_is_no_tuple = id(tuple).__ne__
_is_tuple = id(tuple).__eq__


# How long one question may stop all other threads.
_MAX_STOP = 0.02
# Seconds for each allocated block, and for each object that is asked about; the first is corrected
# by what a question has taken.
_PER_BLOCK = 6e-9
_PER_BLOCK_AND_THING = 0.8e-9
_MIN_PER_BLOCK, _MAX_RISE = 1e-9, 1.25
# In a second, down to where it began: a rise is forgotten within a minute.
_FALL = 0.996
_COUNTED_FOR = 1.0


class _Cost:
    """What a question to the whole heap takes, as far as is known."""

    per_block = _PER_BLOCK
    blocks = 0
    counted_until = -_COUNTED_FOR


def is_too_large() -> bool:
    """Whether a single question to the whole heap would stop other threads for too long."""
    at = time.monotonic()
    if not at <= _Cost.counted_until <= at + _COUNTED_FOR:
        # What nothing is asked about any more is not measured either: a machine that was busy would
        # count as slow for ever.
        unasked = _FALL ** max(0.0, at - _Cost.counted_until)
        _Cost.per_block = min(_Cost.per_block, max(_PER_BLOCK, _Cost.per_block * unasked))
        # Counting them takes 0.35 ms where there are five million objects.
        _Cost.blocks, _Cost.counted_until = sys.getallocatedblocks(), at + _COUNTED_FOR
    return _Cost.per_block * _Cost.blocks > _MAX_STOP


def _max_at_once() -> int:
    """About how many objects to ask in one question."""
    left = _MAX_STOP / max(_Cost.blocks, 1) - _Cost.per_block
    return max(_MIN_AT_ONCE, int(left / _PER_BLOCK_AND_THING))


def referrers(things: tuple[object, ...]) -> list[object]:
    """What refers to any of some objects, except plain tuples."""
    # In tuples, which no further question finds.
    found: tuple[object, ...] = ()
    size = _max_at_once()
    for start in range(0, len(things), size):
        started = thread_time()
        found += tuple(_of_types(_is_no_tuple, *tee(_referring([things[start : start + size]]))))
        _learn(thread_time() - started, min(size, len(things)))
    return list({id(thing): thing for thing in found}.values())


def _learn(took: float, count: int) -> None:
    if _Cost.blocks:
        measured = took / _Cost.blocks - count * _PER_BLOCK_AND_THING
        # A machine that is busy makes one measurement look expensive.
        _Cost.per_block = max(_MIN_PER_BLOCK, min(measured, _Cost.per_block * _MAX_RISE))


def referrers_through_tuples(things: tuple[object, ...]) -> list[object]:
    """What refers to plain tuples that refer to any of some objects."""
    found = _of_types(_is_tuple, *tee(_referring([things])))
    tuples = filter(None, map(tuple, [islice(found, _MAX_TUPLES)]))
    del found
    return list(_of_types(_is_no_tuple, *tee(_referring(tuples))))


def instances_of(classes: Iterable[type]) -> list[Any]:
    """The objects of exactly these classes that the collector knows."""
    return list(_instances(tuple(classes)))


def weak_instances_of(classes: Iterable[type]) -> list[weakref.ref[Any]]:
    """The same by weak reference, so that no collection takes the garbage among them for alive."""
    wanted = tuple(classes)
    # Nothing but the iterator over this list refers to what is in it: all of that is gone before
    # the collector is on again.
    return next(without_collection(map(list, [map(weak_reference, _instances(wanted))])))


def _instances(wanted: tuple[type, ...]) -> Iterator[Any]:
    if not wanted or not has_gil():
        return iter(())
    is_wanted = frozenset(map(id, wanted)).__contains__
    if all(flags_of(cls) & HEAP_TYPE for cls in wanted):
        return _of_types(is_wanted, *tee(_referring([wanted])))
    answers, same, read = tee(starmap(gc.get_objects, [()]), 3)
    # Emptied at its end: among all the objects are these iterators, which would keep it for good.
    return _of_types(is_wanted, chain(answers, filter(None, map(list.clear, read))), same)


# By whether the collector was on: what leaves it as it was.
_RESTORE: tuple[Callable[[], object], ...] = (gc.isenabled, gc.enable)


def _turning_it_off(calls: Iterator[Any]) -> Iterator[Any]:
    # That, too, is one call into C: no other thread finds it off, or has turned it off meanwhile.
    was_on: list[bool] = []
    noted = map(was_on.append, map(operator.call, (gc.isenabled,)))
    off = map(operator.call, (gc.disable,))
    restored = map(operator.call, map(operator.getitem, repeat(_RESTORE), was_on))
    try:
        return iter(list(chain(noted, off, calls, restored))[2:-1])
    except BaseException:
        # A hook for audits may raise.
        if was_on == [True]:
            gc.enable()
        raise


def without_collection(calls: Iterator[Any]) -> Iterator[Any]:
    """What some calls into C return, without a collection meanwhile.

    From Python 3.12 on none begins before the next bytecode.
    """
    return _turning_it_off(calls) if sys.version_info < (3, 12) else calls


def _referring(batches: Iterable[tuple[object, ...]]) -> Iterator[tuple[object, ...]]:
    # In tuples, which are left out: as a list, one answer would be found by the next question.
    if not has_gil():
        return iter(())
    return map(tuple, starmap(gc.get_referrers, batches))


def _of_types(
    by_type: Callable[[int], bool], answers: Iterable[Iterable[Any]], same: Iterable[Any]
) -> Iterator[object]:
    """Of the objects in some answers those the identity of whose type is right."""
    kinds = map(id, map(type, chain.from_iterable(same)))
    return compress(chain.from_iterable(answers), map(by_type, kinds))


def loaded(names: Iterable[str]) -> list[type]:
    """The classes of these names, `module:name`, and their subclasses, where they are loaded."""
    return _unique(kin for cls in find_classes(names).values() for kin in kinds_of(cls))


def kinds_of(cls: type) -> list[type]:
    """A class, and all that derive from it."""
    found = [cls]
    for each in found:
        known = set(map(id, found))
        subclasses: list[type] = type.__subclasses__(each)
        found += [sub for sub in subclasses if id(sub) not in known]
    return found


def _unique(classes: Iterable[type]) -> list[type]:
    return list({id(cls): cls for cls in classes}.values())
