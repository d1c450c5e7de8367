"""Questions to the garbage collector, asked so that no other thread can come to harm.

A tuple that a thread is filling from an iterator is in the heap already; if anything else refers to
it when it is finished, the interpreter raises SystemError there. As threads are switched between
bytecodes only, each answer is rid of its tuples within a single call into C: that is why there are
iterators of iterators where a loop would read better. What the heap holds otherwise may be touched.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, filterfalse, groupby, islice, starmap
from operator import itemgetter
from typing import Any

__all__ = ["instances_of", "kinds_of", "loaded", "referrers", "referrers_through_tuples"]

# Of a class that was made at run time, as all those of Python code: its objects refer to it.
_HEAP_TYPE = 1 << 9
_MOST_TUPLES = 50

_has_no_tuples = frozenset({tuple}).isdisjoint


def referrers(things: tuple[object, ...]) -> list[object]:
    """What refers to any of some objects, but for plain tuples."""
    return list(_of(filter(_has_no_tuples, groupby(_referring([things]), type))))


def referrers_through_tuples(things: tuple[object, ...]) -> list[object]:
    """What refers to plain tuples that refer to any of some objects."""
    found = filterfalse(_has_no_tuples, groupby(_referring([things]), type))
    tuples = filter(None, map(tuple, [islice(_of(found), _MOST_TUPLES)]))
    return list(_of(filter(_has_no_tuples, groupby(_referring(tuples), type))))


def instances_of(classes: Iterable[type]) -> list[Any]:
    """The objects of exactly these classes that the collector knows."""
    wanted = frozenset(classes)
    if not wanted:
        return []
    if all(cls.__flags__ & _HEAP_TYPE for cls in wanted):
        candidates = _referring([tuple(wanted)])
    else:
        candidates = chain.from_iterable(starmap(gc.get_objects, [()]))
    return list(_of(filterfalse(wanted.isdisjoint, groupby(candidates, type))))


def _referring(batches: Iterable[tuple[object, ...]]) -> Iterator[object]:
    return chain.from_iterable(starmap(gc.get_referrers, batches))


def _of(groups: Iterable[tuple[type, Iterator[object]]]) -> Iterator[object]:
    return chain.from_iterable(map(itemgetter(1), groups))


def loaded(names: Iterable[str]) -> list[type]:
    """The classes of these names, `module:name`, and their subclasses, where they are loaded."""
    found: list[type] = []
    for name in names:
        module, _, path = name.partition(":")
        cls = vars(sys.modules[module]).get(path) if module in sys.modules else None
        cls = getattr(cls, "__wrapped__", cls)
        if isinstance(cls, type):
            found += [kin for kin in kinds_of(cls) if kin not in found]
    return found


def kinds_of(cls: type) -> list[type]:
    """A class, and all that derive from it."""
    found = [cls]
    for each in found:
        subclasses: list[type] = type.__subclasses__(each)
        found += [sub for sub in subclasses if sub not in found]
    return found
