"""How one object refers to another, as code: the attribute, index or key."""

from __future__ import annotations

import functools
import io
from collections import deque
from types import CellType, FunctionType, MethodType, TracebackType

from closewait_guard._live import (
    MAX_ITEMS,
    MISSING,
    attributes_of,
    class_value,
    elements_of,
    is_a,
    is_any_of,
    items_of,
    native_field,
    type_qualname,
)

__all__ = [
    "attribute_of",
    "item_of",
]


_MAX_KEY_LENGTH = 40
_MAX_BITS = 128
_MAX_DECIMAL = 1 << _MAX_BITS

# The fields of C types, which have no dict.
_C_FIELDS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (io.BufferedReader, ("raw",)),
    (io.BufferedWriter, ("raw",)),
    (io.TextIOWrapper, ("buffer",)),
    (MethodType, ("__self__", "__func__")),
    (functools.partial, ("func", "args", "keywords")),
    (BaseException, ("__traceback__", "__context__", "__cause__", "args")),
    (TracebackType, ("tb_frame", "tb_next")),
    (CellType, ("cell_contents",)),
    (FunctionType, ("__closure__", "__defaults__", "__kwdefaults__", "__dict__")),
)


def attribute_of(parent: object, child: object) -> str | None:
    """The name of the attribute of the parent that is `child`, if there is one."""
    for name, value in attributes_of(parent):
        if value is child:
            return name
    for cls, names in _C_FIELDS:
        if is_a(parent, cls):
            for name in names:
                if native_field(parent, cls, name) is child:
                    return name
    return None


def item_of(parent: object, child: object) -> str | None:
    """The place of the child in a container, as `[3]` or `['EUR']`; None if it is no container."""
    if is_a(parent, dict):
        items = items_of(parent)
        found = next((key for key, value in items if value is child), MISSING)
        if found is not MISSING:
            return f"[{_format_key(found)}]"
        return ".keys()" if len(items) < MAX_ITEMS else "[...]"
    if is_any_of(parent, (list, tuple, deque)):
        elements = elements_of(parent)
        for number, value in enumerate(elements):
            if value is child:
                return _field_name(parent, number) or f"[{number}]"
        return None if len(elements) < MAX_ITEMS else "[...]"
    return "{...}" if is_any_of(parent, (set, frozenset)) else None


def _field_name(parent: object, number: int) -> str | None:
    """The name that a named tuple has for one of its items."""
    fields = class_value(type(parent), "_fields")
    if type(fields) is tuple and number < len(fields) and type(fields[number]) is str:
        return f".{fields[number]}"
    return None


def _format_key(key: object) -> str:
    """A plain key as text, shortened; for others the type, because repr would run their code."""
    if type(key) is tuple and len(key) <= 4:
        return ", ".join(_format_key(part) for part in key)
    if type(key) is str:
        return repr(key if len(key) <= _MAX_KEY_LENGTH else key[: _MAX_KEY_LENGTH - 3] + "...")
    if type(key) is int and not -_MAX_DECIMAL < key < _MAX_DECIMAL:
        # It may have more decimal digits than the interpreter converts.
        return hex(key >> max(0, key.bit_length() - _MAX_BITS)) + "..."
    if type(key) is int or type(key) is float or type(key) is bool or key is None:
        return repr(key)
    return f"<{type_qualname(type(key))}>"
