"""How a library keeps its connections: what each file here says of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["UNBOUNDED", "PoolKind", "PoolUse", "nothing"]

# What some libraries give as the bound of a pool that has none.
UNBOUNDED = 1_000_000


class PoolUse(NamedTuple):
    """What a pool has to do with one connection. Plain data: it keeps nothing alive.

    Attributes:
        library: The package.
        name: The pool, as its users would call it.
        is_idle: The connection waits in the pool, rather than being checked out.
        most: How many connections the pool keeps; None where it has no bound.
        pools: How many of the library's pools have idle connections to the same address.
        is_surplus: There are more of them than a program has reason to make.
    """

    library: str
    name: str
    is_idle: bool
    most: int | None
    pools: int = 1
    is_surplus: bool = False

    @property
    def owner(self) -> str:
        """What the table of hints knows it by."""
        return f"{self.library} for each call" if self.is_surplus else self.library

    @property
    def sentence(self) -> str:
        """Where the connection is."""
        where = "idle in" if self.is_idle else "checked out of"
        bound = f"at most {self.most:,}" if self.most is not None else "without a bound"
        beside = f", one of {self.pools:,} pools for this address" if self.pools > 1 else ""
        return f"{self.name}: {where} the pool ({bound}){beside}"


def nothing(_: Any) -> Iterable[object]:
    """For a kind whose pool does not know what is checked out of it, or what is idle."""
    return ()


@dataclass(frozen=True, slots=True)
class PoolKind:
    """One kind of pool. Each callable is given the pool, and may raise: then it is passed over.

    Attributes:
        library: The package.
        classes: The classes of the pool, as `module:name`; subclasses are found by themselves.
        name: What its users would call it.
        most: How many connections it keeps; None where there is no bound.
        idle: The connections that wait in it: what has a `fileno()`, or is a descriptor.
        busy: Those that are checked out.
    """

    library: str
    classes: tuple[str, ...]
    name: Callable[[Any], str]
    most: Callable[[Any], int | None]
    idle: Callable[[Any], Iterable[object]]
    busy: Callable[[Any], Iterable[object]] = nothing
