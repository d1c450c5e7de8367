"""All objects of some classes, in one pass over the heap: every object refers to its class."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["instances_of", "loaded"]


def loaded(names: Iterable[str]) -> list[type]:
    """The classes of these names, `module:name`, and their subclasses, where they are loaded."""
    found: list[type] = []
    for name in names:
        module, _, path = name.partition(":")
        cls = vars(sys.modules[module]).get(path) if module in sys.modules else None
        if isinstance(cls, type):
            found += [kin for kin in _with_subclasses(cls) if kin not in found]
    return found


def instances_of(classes: Iterable[type]) -> list[Any]:
    """The objects of exactly these classes that the collector knows."""
    wanted = set(classes)
    return [thing for thing in gc.get_referrers(*wanted) if type(thing) in wanted] if wanted else []


def _with_subclasses(cls: type) -> list[type]:
    found = [cls]
    for each in found:
        subclasses: list[type] = type.__subclasses__(each)
        found += [sub for sub in subclasses if sub not in found]
    return found
