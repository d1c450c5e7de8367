"""The values of a frame of Python 3.11 to 3.13, copied out of its memory.

Importing this raises where the layout is not the one that is thought.
"""

from __future__ import annotations

import ctypes
import operator
import sys
from itertools import starmap
from types import CellType, CodeType, FrameType
from typing import Any, TypeAlias

from closewait_guard._cpython import current_frame

__all__ = [
    "copied_locals",
]


_Pairs: TypeAlias = list[tuple[str, Any]]

# These Pythons agree: in the frame object the pointer to the frame follows `f_back`; in
# the frame the values follow eight pointers, an int and a few bytes.
_POINTER = ctypes.sizeof(ctypes.c_void_p)
_TO_FRAME = object.__basicsize__ + _POINTER
_TO_VALUES = 8 * _POINTER + 8
_MAX_VARIABLES = 250
_ATTEMPTS = 3


class _Copy(ctypes.Structure):
    _fields_ = (
        ("before", ctypes.c_char * _TO_VALUES),
        ("values", ctypes.py_object * _MAX_VARIABLES),
    )


class _Numbers(ctypes.Structure):
    _fields_ = (
        ("before", ctypes.c_char * _TO_VALUES),
        ("values", ctypes.c_size_t * _MAX_VARIABLES),
    )


# Unlike ctypes.memmove, this keeps the interpreter's lock.
_move = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


def _copied(
    frame: FrameType, copy: ctypes.Structure, count: int, *then: tuple[Any, ...]
) -> list[Any]:
    """Fill a copy; the results of further calls into C, before any thread goes on.

    A frame that returns moves its values: each step is done by the one call of `starmap`. Nor can a
    collection come between, which might let threads switch: all that the second step allocates is
    a tuple of three, and the first has just given one back.
    """
    at = ctypes.c_void_p()
    steps = (
        (_move, ctypes.addressof(at), id(frame) + _TO_FRAME, _POINTER),
        (_move, ctypes.addressof(copy), at, _TO_VALUES + count * _POINTER),
        *then,
    )
    return list(starmap(operator.call, steps))[2:]


def _names(code: CodeType) -> tuple[str, ...]:
    plain = frozenset(code.co_varnames)
    cells = (name for name in code.co_cellvars if name not in plain)
    return (*code.co_varnames, *cells, *code.co_freevars)[:_MAX_VARIABLES]


def _pointers_of(frame: FrameType, count: int) -> list[int]:
    """The addresses of the values, zero for what is not bound: plain numbers."""
    numbers = _Numbers()
    _copied(frame, numbers, count)
    return list(numbers.values[:count])


def copied_locals(frame: FrameType) -> _Pairs:
    names = _names(frame.f_code)
    cells = frozenset((*frame.f_code.co_cellvars, *frame.f_code.co_freevars))
    for _ in range(_ATTEMPTS):
        copy, pointers = _Copy(), _pointers_of(frame, len(names))
        bound = [place for place, pointer in enumerate(pointers) if pointer]
        taken = [(operator.getitem, copy.values, place) for place in bound]
        try:
            values = _copied(frame, copy, len(names), *taken)
        except ValueError:  # A variable was deleted meanwhile.
            continue
        found = ((names[place], value) for place, value in zip(bound, values, strict=True))
        return [pair for name, value in found for pair in _contents(name, value, cells)]
    return []


def _contents(name: str, value: Any, cells: frozenset[str]) -> _Pairs:
    if name not in cells or type(value) is not CellType:
        return [(name, value)]
    try:
        return [(name, value.cell_contents)]
    except ValueError:
        return []


def _is_understood() -> bool:
    """Whether this build of Python lays frames out as is thought."""
    first, shared, unbound = object(), object(), None
    del unbound

    def uses() -> object:
        return shared

    # As numbers first: what is no address must not be taken for an object.
    names = _names(current_frame(0).f_code)
    pointers = dict(zip(names, _pointers_of(current_frame(0), len(names)), strict=True))
    if (pointers["first"], pointers["uses"], pointers["unbound"]) != (id(first), id(uses), 0):
        return False
    found = dict(copied_locals(current_frame(0)))
    return all(
        found.get(name) is value
        for name, value in (("first", first), ("shared", shared), ("uses", uses))
    )


if (
    sys.implementation.name != "cpython"
    or hasattr(sys, "gettotalrefcount")
    # Without its global lock, other threads run meanwhile.
    or "t" in getattr(sys, "abiflags", "")
    or not (3, 11) <= sys.version_info < (3, 14)
    or not _is_understood()
):
    raise ImportError("frames of this build of Python are laid out in another way")
