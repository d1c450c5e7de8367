"""The objects that hold native sockets: who answers with a descriptor's number."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Set
from typing import Any

from closewait_guard._heap import instances_of, loaded
from closewait_guard._objects import derives_from
from closewait_guard._wrappers import SOCKET
from closewait_guard.integrations import OWNERS, OwnerKind

__all__ = ["owners_of"]


def owners_of(fds: Set[int]) -> dict[int, Any]:
    """Objects by descriptor. Whoever asks lets go of them soon."""
    found: dict[int, Any] = {}
    for kind in OWNERS:
        if fds - found.keys():
            for owner, descriptors in _with_descriptors(kind):
                found |= dict.fromkeys(descriptors & (fds - found.keys()), owner)
    return found


def _with_descriptors(kind: OwnerKind) -> Iterator[tuple[Any, set[int]]]:
    classes = [cls for cls in loaded(kind.classes) if not derives_from(cls, [SOCKET])]
    for owner in instances_of(classes):
        # It may be closed, or busy with something that does not allow to be asked.
        with contextlib.suppress(Exception):
            yield owner, set(kind.descriptors(owner))
