"""The objects that hold native sockets: who answers with a descriptor's number."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Set
from typing import Any

from closewait_guard._heap import kinds_of
from closewait_guard._objects import derives_from, find_classes
from closewait_guard._wrappers import SOCKET
from closewait_guard.integrations import OWNERS, OwnerKind

__all__ = ["owners_of"]


def owners_of(fds: Set[int], find: Callable[[dict[int, type]], Iterable[object]]) -> dict[int, Any]:
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
