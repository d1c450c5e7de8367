"""Who is told, in a forked child, that it is one.

The interpreter keeps what it is to call after a fork until its very end, and so all that this
refers to: the globals of its module, the loader of that, and what this holds, as pytest's does its
configuration and all tests. Here it is given next to nothing, or the whole program would stay in
memory, to be taken apart piece by piece when it ends.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from types import FunctionType

__all__ = ["in_child"]

_told: list[weakref.ref[Callable[[], None]]] = []


def in_child(function: Callable[[], None]) -> Callable[[], None]:
    """Have a function of a module called in every child, those that came first before it."""
    _told.append(weakref.ref(function))
    return function


def _tell() -> None:
    for told in _told:
        function = told()
        if function is not None:
            function()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FunctionType(_tell.__code__, {"_told": _told}))
