"""Which objects of a library have descriptors that no socket object is known for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from closewait_guard.integrations._descriptor import descriptor_of

__all__ = ["OwnerKind", "own_descriptor"]


@dataclass(frozen=True, slots=True)
class OwnerKind:
    """One kind of object that holds a native socket.

    Attributes:
        classes: Its classes, as `module:name`; subclasses are found by themselves.
        descriptors: Those that it has at this moment; may raise, then it is passed over.
    """

    classes: tuple[str, ...]
    descriptors: Callable[[Any], Iterable[int]]


def own_descriptor(owner: Any) -> Iterable[int]:
    """For what has one socket, or wraps something that has."""
    fd = descriptor_of(owner)
    return () if fd is None else (fd,)
