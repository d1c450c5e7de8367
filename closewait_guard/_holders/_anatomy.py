"""How one object refers to another, found without running a line of the program's code."""

from __future__ import annotations

import contextlib
import functools
import io
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from types import (
    CellType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    TracebackType,
)
from typing import Any, cast

__all__ = ["attribute_dict", "attribute_of", "class_dict", "item_of", "kin_of", "type_name"]

_mro = type.__dict__["__mro__"].__get__
_module = type.__dict__["__module__"].__get__
_vars = type.__dict__["__dict__"].__get__

_MOST_ITEMS = 200_000
_MOST_TEXT = 40

# What C types call the references that they do not show in a dict.
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


def type_name(thing: object) -> str:
    """`urllib3.response.HTTPResponse`; built-in types without their module."""
    module, name = _module(type(thing)), type(thing).__qualname__
    return f"{module}.{name}" if isinstance(module, str) and module != "builtins" else name


def kin_of(thing: object) -> tuple[type, ...]:
    """The classes of an object; unlike isinstance, this wakes no proxy."""
    kin: tuple[type, ...] = _mro(type(thing))
    return kin


def class_dict(cls: type) -> Mapping[str, Any]:
    """What a class itself has."""
    found: Mapping[str, Any] = _vars(cls)
    return found


def attribute_dict(thing: object) -> dict[str, Any] | None:
    """The dict of an instance, past whatever its class calls `__dict__`."""
    for cls in kin_of(thing):
        descriptor = _vars(cls).get("__dict__")
        if type(descriptor) is GetSetDescriptorType:
            try:
                found = descriptor.__get__(thing)
            except (AttributeError, TypeError):
                return None
            return found if type(found) is dict else None
    return None


def attribute_of(parent: object, child: object) -> str | None:
    """The name of the attribute of an instance that is `child`."""
    names = (
        name for name, value in _attributes(parent) if value is child and isinstance(name, str)
    )
    return next(names, None)


def _attributes(parent: object) -> Iterator[tuple[Any, object]]:
    yield from list((attribute_dict(parent) or {}).items())
    kin = kin_of(parent)
    for cls in kin:
        for name, descriptor in list(_vars(cls).items()):
            if type(descriptor) is MemberDescriptorType:
                with contextlib.suppress(AttributeError, TypeError):
                    yield name, descriptor.__get__(parent)
    for cls, fields in _C_FIELDS:
        if cls in kin:
            for name in fields:
                with contextlib.suppress(AttributeError, ValueError):
                    yield name, getattr(parent, name)


def item_of(parent: object, child: object) -> str | None:
    """`[3]` or `['EUR']`: where in a container the child is; None if the parent is none."""
    kin = kin_of(parent)
    if dict in kin:
        items: dict[Any, object] = dict.copy(cast("dict[Any, object]", parent))
        for key, value in islice(items.items(), _MOST_ITEMS):
            if value is child:
                return f"[{_key(key)}]"
        return ".keys()"
    fields = _vars(type(parent)).get("_fields")
    for number, value in _numbered(parent, kin):
        if value is child:
            is_named = isinstance(fields, tuple) and number < len(fields)
            return f".{fields[number]}" if is_named else f"[{number}]"
    return "{...}" if set in kin or frozenset in kin else None


def _numbered(parent: Any, kin: tuple[type, ...]) -> Iterator[tuple[int, object]]:
    for cls in (list, tuple, deque):
        if cls in kin:
            with contextlib.suppress(RuntimeError):  # It changes while we look.
                yield from enumerate(islice(cls.__iter__(parent), _MOST_ITEMS))


def _key(key: object) -> str:
    """The text of a plain key, shortened; of others the type, for a repr would run their code."""
    if type(key) is tuple and len(key) <= 4:
        return ", ".join(_key(part) for part in key)
    if type(key) is str:
        return repr(key if len(key) <= _MOST_TEXT else key[: _MOST_TEXT - 3] + "...")
    if type(key) in (int, float, bool, type(None)):
        return repr(key)
    return f"<{type(key).__qualname__}>"
