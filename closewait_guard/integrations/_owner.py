"""Which objects of a library have descriptors that no socket object is known for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["OwnerKind", "own_fileno"]


@dataclass(frozen=True, slots=True)
class OwnerKind:
    """One kind of object that holds a native socket.

    Attributes:
        classes: Its classes, as `module:name`; subclasses are found by themselves.
        descriptors: Those that it has at this moment; may raise, then it is passed over.
    """

    classes: tuple[str, ...]
    descriptors: Callable[[Any], Iterable[int]]


def own_fileno(owner: Any) -> Iterable[int]:
    """For what answers like a file."""
    return [owner.fileno()]
