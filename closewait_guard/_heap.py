"""Questions to the garbage collector, asked so that no other thread can come to harm.

A tuple that a thread is filling from an iterator is in the heap already; if anything else refers to
it when it is finished, the interpreter raises SystemError there. As threads are switched between
bytecodes only, each answer is rid of its tuples within a single call into C: that is why there are
iterators of iterators where a loop would read better. What the heap holds otherwise may be touched,
but not compared: a class may have any `__eq__` and no `__hash__`; its identity stands for it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, compress, islice, starmap, tee
from typing import Any

from closewait_guard._objects import HEAP_TYPE, find_classes, flags_of

__all__ = ["instances_of", "kinds_of", "loaded", "referrers", "referrers_through_tuples"]

_MOST_TUPLES = 50

_is_no_tuple = id(tuple).__ne__
_is_tuple = id(tuple).__eq__


def referrers(things: tuple[object, ...]) -> list[object]:
    """What refers to any of some objects, but for plain tuples."""
    return list(_chosen(_is_no_tuple, *tee(_referring([things]))))


def referrers_through_tuples(things: tuple[object, ...]) -> list[object]:
    """What refers to plain tuples that refer to any of some objects."""
    found = _chosen(_is_tuple, *tee(_referring([things])))
    tuples = filter(None, map(tuple, [islice(found, _MOST_TUPLES)]))
    del found
    return list(_chosen(_is_no_tuple, *tee(_referring(tuples))))


def instances_of(classes: Iterable[type]) -> list[Any]:
    """The objects of exactly these classes that the collector knows."""
    wanted = tuple(classes)
    if not wanted:
        return []
    is_wanted = frozenset(map(id, wanted)).__contains__
    if all(flags_of(cls) & HEAP_TYPE for cls in wanted):
        return list(_chosen(is_wanted, *tee(_referring([wanted]))))
    answers, same, read = tee(starmap(gc.get_objects, [()]), 3)
    # Emptied at its end: among all the objects are these iterators, which would keep it for good.
    return list(_chosen(is_wanted, chain(answers, filter(None, map(list.clear, read))), same))


def _referring(batches: Iterable[tuple[object, ...]]) -> Iterator[tuple[object, ...]]:
    # In tuples, which are left out: as a list, one answer would be found by the next question.
    return map(tuple, starmap(gc.get_referrers, batches))


def _chosen(
    by_type: Callable[[int], bool], answers: Iterable[Iterable[Any]], same: Iterable[Any]
) -> Iterator[object]:
    """Of the objects in some answers those the identity of whose type is right."""
    kinds = map(id, map(type, chain.from_iterable(same)))
    return compress(chain.from_iterable(answers), map(by_type, kinds))


def loaded(names: Iterable[str]) -> list[type]:
    """The classes of these names, `module:name`, and their subclasses, where they are loaded."""
    return _each_once(kin for cls in find_classes(names).values() for kin in kinds_of(cls))


def kinds_of(cls: type) -> list[type]:
    """A class, and all that derive from it."""
    found = [cls]
    for each in found:
        known = set(map(id, found))
        subclasses: list[type] = type.__subclasses__(each)
        found += [sub for sub in subclasses if id(sub) not in known]
    return found


def _each_once(classes: Iterable[type]) -> list[type]:
    return list({id(cls): cls for cls in classes}.values())
