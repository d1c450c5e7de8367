"""The values of a frame of Python 3.11 to 3.15, copied out of its memory.

Its variables are read there until 3.13 only. Importing this raises where the layout is not the one
that is thought.
"""

from __future__ import annotations

import ctypes
import operator
import sys
from collections.abc import Iterable
from functools import lru_cache
from itertools import starmap
from types import CellType, CodeType, FrameType
from typing import Any, TypeAlias

from closewait_guard._cpython import current_frame

__all__ = [
    "copied_locals",
    "copied_stack",
]


_Pairs: TypeAlias = list[tuple[str, Any]]

# These Pythons agree: in the frame object the pointer to the frame follows `f_back`; in
# the frame the values follow eight pointers, or nine, and eight bytes.
_HAS_TAGS = sys.version_info >= (3, 14)
_POINTER = ctypes.sizeof(ctypes.c_void_p)
_TO_FRAME = object.__basicsize__ + _POINTER
_TO_VALUES = (9 if _HAS_TAGS else 8) * _POINTER + 8
_MAX_VALUES = 250
_ATTEMPTS = 3
# Of a value that is no strong reference: borrowed from a variable, a number, or nothing at all.
_TAGS = 3
_UNBOUND = 1 if _HAS_TAGS else 0


class _Copy(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_size_t),
        ("before", ctypes.c_char * _TO_VALUES),
        ("values", ctypes.py_object * _MAX_VALUES),
    )


class _Numbers(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_size_t),
        ("before", ctypes.c_char * _TO_VALUES),
        ("values", ctypes.c_size_t * _MAX_VALUES),
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
    at, start = ctypes.c_void_p.from_buffer(copy), ctypes.addressof(copy)
    steps = (
        (_move, start, id(frame) + _TO_FRAME, _POINTER),
        (_move, start + _POINTER, at, _TO_VALUES + count * _POINTER),
        *then,
    )
    return list(starmap(operator.call, steps))[2:]


def _names(code: CodeType) -> tuple[str, ...]:
    plain = frozenset(code.co_varnames)
    cells = (name for name in code.co_cellvars if name not in plain)
    return (*code.co_varnames, *cells, *code.co_freevars)


def _pointers_of(frame: FrameType, count: int) -> list[int]:
    """The addresses of the values: plain numbers."""
    numbers = _Numbers()
    _copied(frame, numbers, count)
    return list(numbers.values[:count])


def _places_of(pointers: Iterable[int]) -> list[int]:
    """Where a strong reference is."""
    return [place for place, each in enumerate(pointers) if each and not each & _TAGS]


def copied_locals(frame: FrameType) -> _Pairs:
    """The variables of a call."""
    names = _names(frame.f_code)[:_MAX_VALUES]
    cells = frozenset((*frame.f_code.co_cellvars, *frame.f_code.co_freevars))
    for _ in range(_ATTEMPTS):
        copy, pointers = _Copy(), _pointers_of(frame, len(names))
        bound = _places_of(pointers)
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


def copied_stack(frame: FrameType) -> list[object]:
    """What a call needs when it goes on and has no variable for: what a `with` is to exit.

    That is what the handler of an exception is to find on the stack, so it is alive at each
    instruction that has the handler. Whether what stands above is alive is not known.
    """
    code, variables = frame.f_code, len(_names(frame.f_code))
    for _ in range(_ATTEMPTS):
        place = frame.f_lasti
        count = variables + _handled_depth(code.co_exceptiontable, place)
        if not variables < count <= _MAX_VALUES:
            return []
        first, copy = _Numbers(), _Copy()
        [still] = _copied(frame, first, count, (getattr, frame, "f_lasti"))
        if first.address in range(id(frame), id(frame) + frame.__sizeof__()):
            return []  # The call has ended.
        pointers = [0] * variables + first.values[variables:count]
        taken = [(operator.getitem, copy.values, each) for each in _places_of(pointers)]
        # In C as well: unless all is as it was, this raises before anything is taken.
        unchanged = map({bytes(first): None}.__getitem__, map(bytes, (copy,)))
        try:
            if still == place:
                return _copied(frame, copy, count, (next, unchanged), *taken)[1:]
        except KeyError:
            continue
    return []


@lru_cache(4096)
def _handled_depth(table: bytes, place: int) -> int:
    """How much of the stack the handler of an exception finds, that is raised at an instruction.

    The table has four numbers for each run of instructions, of six bits a byte: where it starts and
    how long it is, in units of two bytes, the handler, and the depth with a flag as its last bit.
    """
    numbers, number = list[int](), 0
    for byte in table:
        number = number << 6 | byte & 0x3F
        if not byte & 0x40:
            numbers.append(number)
            number = 0
    for entry in range(0, len(numbers), 4):
        start, length, _, depth = numbers[entry : entry + 4]
        if start <= place // 2 < start + length:
            return depth >> 1
    return 0


class _Block:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _is_understood() -> bool:
    """Whether this build of Python lays frames out as is thought."""
    first, shared, unbound, block = object(), object(), None, [_Block()]
    del unbound

    def uses() -> object:
        return shared

    # As numbers first: what is no address must not be taken for an object.
    names = _names(current_frame(0).f_code)
    pointers = dict(zip(names, _pointers_of(current_frame(0), len(names)), strict=True))
    if (pointers["first"], pointers["uses"], pointers["unbound"]) != (
        id(first),
        id(uses),
        _UNBOUND,
    ):
        return False
    with block[0]:
        stack = copied_stack(current_frame(0))
    if not any(block[0] in (value, getattr(value, "__self__", None)) for value in stack):
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
    or not (3, 11) <= sys.version_info < (3, 16)
    or not _is_understood()
):
    raise ImportError("frames of this build of Python are laid out in another way")
