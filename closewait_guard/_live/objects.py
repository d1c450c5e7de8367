"""Look at objects of the program without running a line of its code.

Whatever a class defines is passed by: its `__getattribute__`, its properties, its `__eq__` and
`__hash__` and those of its metaclass, a `__class__` that lies. What is read are slots of `object`,
`type` and the exact built-in types, by the descriptors of these types themselves. Classes are
compared by identity, names only if they are exact strings.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from types import (
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, Final

from closewait_guard._interruptions import interrupts

__all__ = [
    "HEAP_TYPE",
    "MAX_ITEMS",
    "MISSING",
    "attribute_dict",
    "attributes_of",
    "call_native",
    "class_items",
    "class_value",
    "derives_from",
    "elements_of",
    "exact_text",
    "field",
    "find_classes",
    "flags_of",
    "is_a",
    "is_any_of",
    "is_exactly",
    "is_tls",
    "items_of",
    "layers_of",
    "loaded_modules",
    "module_dict",
    "module_name",
    "module_of_file",
    "mro_of",
    "native_field",
    "number_of",
    "plain_of",
    "text_of",
    "type_name",
    "type_qualname",
    "value_at",
]


# Of a class that was made at run time, as all those of Python code: its objects refer to it.
HEAP_TYPE = 1 << 9
# What `multiprocessing` calls the program's own module while a spawned child imports it.
_MAIN, _SPAWNED_MAIN = "__main__", "__mp_main__"
# How many items are copied in one call, during which no other thread runs.
MAX_ITEMS = 100_000
_ATTEMPTS = 8

MISSING: Final = object()

_mro = type.__dict__["__mro__"].__get__
_vars = type.__dict__["__dict__"].__get__
_flags = type.__dict__["__flags__"].__get__
_qualname = type.__dict__["__qualname__"].__get__
_builtin_module = type.__dict__["__module__"].__get__
_module_vars: Any = vars(ModuleType)["__dict__"].__get__
_as_text = str.__str__
_SLOTS = (MemberDescriptorType, GetSetDescriptorType)
_PLAIN = (str, int, bool, type(None))
_TLS_CLASSES = (("ssl", "SSLSocket"), ("gevent.ssl", "_contextawaresock"))
_METHODS = (MethodDescriptorType, WrapperDescriptorType)


def mro_of(cls: type) -> tuple[type, ...]:
    """A class and all that it derives from."""
    found: tuple[type, ...] = _mro(cls)
    return found


def flags_of(cls: type) -> int:
    """What the interpreter notes of a class."""
    found: int = _flags(cls)
    return found


def class_items(cls: type) -> list[tuple[Any, Any]]:
    """What a class itself has, by name."""
    return _first(_vars(cls).items())


def class_value(cls: type, name: str, otherwise: Any = None) -> Any:
    """What a class itself has under a name."""
    return _look_up(_vars(cls), name, otherwise)


def is_a(thing: object, cls: type) -> bool:
    """Whether the true type of an object derives from a class."""
    kind = type(thing)
    # By identity: a metaclass may compare in its own way.
    return kind is cls or id(cls) in map(id, _mro(kind))


def is_any_of(thing: object, classes: Iterable[type]) -> bool:
    """Whether the true type of an object derives from one of some classes."""
    return derives_from(type(thing), classes)


def derives_from(cls: type, classes: Iterable[type]) -> bool:
    """Whether a class is, or derives from, one of some classes."""
    wanted = set(map(id, classes))
    return not wanted.isdisjoint(map(id, _mro(cls)))


def is_exactly(thing: object, classes: Iterable[type]) -> bool:
    """Whether the true type of an object is one of some classes."""
    kind = type(thing)
    return any(each is kind for each in classes)


def text_of(value: object) -> str | None:
    """A string as an exact one; None for anything else."""
    if type(value) is str:
        return value
    return _as_text(value) if is_a(value, str) else None


def plain_of(values: Iterable[object]) -> frozenset[object]:
    """Those that can be compared without running a line of the program's code."""
    return frozenset(each for each in values if is_exactly(each, (str, bytes, int)))


def exact_text(value: object) -> str:
    """The text of anything, as an exact string: only what is no string is asked for it."""
    found = text_of(value)
    return _as_text(str(value)) if found is None else found


def number_of(value: object) -> int | None:
    """A plain number; None for anything else."""
    return value if type(value) is int else None


def type_qualname(cls: type) -> str:
    """`HTTPResponse`."""
    return text_of(_qualname(cls)) or "?"


def module_name(cls: type) -> str | None:
    """The module that a class names as its own, if it names one."""
    if _flags(cls) & HEAP_TYPE:
        name = text_of(class_value(cls, "__module__"))
        return _MAIN if name == _SPAWNED_MAIN else name
    return text_of(_builtin_module(cls))


def type_name(thing: object) -> str:
    """`urllib3.response.HTTPResponse`; built-in types without their module."""
    cls = type(thing)
    module = module_name(cls)
    return type_qualname(cls) if module in (None, "builtins") else f"{module}.{type_qualname(cls)}"


def items_of(mapping: Any) -> list[tuple[Any, Any]]:
    """The items that a dict, or an object of a subclass, really has; not more than a bound."""
    return _first(dict.items(mapping)) if is_a(mapping, dict) else []


def value_at(mapping: Any, name: str, otherwise: Any = None) -> Any:
    """What a dict has under an exact string. No other key is compared with it."""
    return _look_up(mapping, name, otherwise) if is_a(mapping, dict) else otherwise


def _first(items: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    for _ in range(_ATTEMPTS):
        try:
            return list(islice(items, MAX_ITEMS))
        except RuntimeError:
            continue  # A collection meanwhile has changed it.
    return []


def _look_up(mapping: Any, name: str, otherwise: Any) -> Any:
    for _ in range(_ATTEMPTS):
        items = dict.items(mapping) if is_a(mapping, dict) else mapping.items()
        try:
            for key, value in items:
                if type(key) is str and key == name:
                    return value
        except RuntimeError:
            continue  # Another thread has changed it.
        return otherwise
    return otherwise


def elements_of(thing: Any) -> list[Any]:
    """What a list, tuple, set or deque, or an object of a subclass, really has, within a bound."""
    for cls in (list, tuple, set, frozenset, deque):
        if is_a(thing, cls):
            for _ in range(_ATTEMPTS):
                with contextlib.suppress(RuntimeError):
                    return list(islice(cls.__iter__(thing), MAX_ITEMS))
    return []


def module_dict(thing: object) -> dict[str, Any] | None:
    """The variables of a module; None for what only stands in for one."""
    found = _module_vars(thing) if is_a(thing, ModuleType) else None
    return found if type(found) is dict else None


def is_tls(sock: object) -> bool:
    """Whether it is a socket of Python's ssl or of gevent's, where a program has loaded these."""
    if type(sock) is socket.socket:
        return False
    for module, name in _TLS_CLASSES:
        variables = module_dict(sys.modules.get(module))
        if variables is not None and is_a(sock, variables.get(name, type(None))):
            return True
    return False


def loaded_modules() -> list[tuple[str, dict[str, Any]]]:
    """The names and variables of what has been imported; a spawned `__main__` may come twice."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name, module in items_of(sys.modules):
        # No call for each of those that are just modules.
        variables = _module_vars(module) if type(module) is ModuleType else module_dict(module)
        if type(name) is str and variables is not None:
            found.append((name if name != _SPAWNED_MAIN else _MAIN, variables))
            if name == _SPAWNED_MAIN:
                found += _variables_of_spawned_main(variables)
    return found


def _variables_of_spawned_main(copied: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runpy copies the variables into the module; functions keep to those that it ran with."""
    for _, value in items_of(copied):
        names = value.__globals__ if type(value) is FunctionType else copied
        if names is not copied and value_at(names, "__name__") == _SPAWNED_MAIN:
            yield _MAIN, names
            break


def module_of_file(filename: str) -> str | None:
    """The name of the first module that has been imported from a file."""
    for name, variables in loaded_modules():
        found: Any = None
        try:
            # As `value_at` looks, without a call for each module.
            for key, value in variables.items():
                if type(key) is str and key == "__file__":
                    found = value
                    break
        except RuntimeError:  # Another thread has changed it.
            found = value_at(variables, "__file__")
        if found is not None and (found if type(found) is str else text_of(found)) == filename:
            return name
    return None


def find_classes(names: Iterable[str]) -> dict[str, type]:
    """Those of some classes, named as `module:name`, that are loaded."""
    wanted: dict[str, list[str]] = {}
    for name in names:
        wanted.setdefault(name.partition(":")[0], []).append(name)
    found = {}
    # Of all the others not even the variables are looked at.
    items = items_of(sys.modules)
    for module, value in [each for each in items if type(each[0]) is str and each[0] in wanted]:
        for name in wanted[module]:
            cls = _unwrapped(value_at(module_dict(value), name.partition(":")[2]))
            if cls is not None:
                found[name] = cls
    return found


def _unwrapped(thing: Any) -> type | None:
    """A class, or the one that a wrapper stands for."""
    for _ in range(_ATTEMPTS):
        if is_a(thing, type):
            found: type = thing
            return found
        thing = field(thing, "__wrapped__")
    return None


def attribute_dict(thing: object) -> dict[str, Any] | None:
    """The dict of an instance, past whatever its class calls `__dict__`."""
    for cls in _mro(type(thing)):
        descriptor = class_value(cls, "__dict__")
        if type(descriptor) is GetSetDescriptorType:
            try:
                found = descriptor.__get__(thing)
            except (AttributeError, TypeError):
                return None
            return found if is_a(found, dict) else None
    return None


def _slots_of(thing: object) -> Iterator[tuple[str, Any]]:
    for cls in _mro(type(thing)):
        for name, descriptor in class_items(cls):
            if type(descriptor) is MemberDescriptorType and type(name) is str:
                with contextlib.suppress(AttributeError, TypeError):
                    yield name, descriptor.__get__(thing)


def attributes_of(thing: object) -> Iterator[tuple[str, Any]]:
    """The attributes of an instance that are stored: in its dict, or in slots."""
    variables = attribute_dict(thing)
    for name, value in items_of(variables) if variables is not None else ():
        if type(name) is str:
            yield name, value
    yield from _slots_of(thing)


def field(thing: object, name: str, otherwise: Any = None) -> Any:
    """A stored attribute of an object; for what a class computes, `otherwise`.

    A plain value of the class counts where the object itself has none.
    """
    variables = attribute_dict(thing)
    found = MISSING if variables is None else value_at(variables, name, MISSING)
    if found is not MISSING:
        return found
    for cls in _mro(type(thing)):
        stored = class_value(cls, name, MISSING)
        if is_exactly(stored, _SLOTS):
            return _read_slot(stored, thing, otherwise)
        if stored is not MISSING:
            return stored if is_exactly(stored, _PLAIN) else otherwise
    return otherwise


def native_field(thing: object, cls: type, name: str, otherwise: Any = None) -> Any:
    """What a class in C stores of an object of it, whatever subclasses call by that name."""
    slot = class_value(cls, name)
    if is_a(thing, cls) and is_exactly(slot, _SLOTS):
        return _read_slot(slot, thing, otherwise)
    return otherwise


def _read_slot(slot: Any, thing: object, otherwise: Any) -> Any:
    try:
        return slot.__get__(thing)
    except Exception as error:  # It has no value, or what computes it in C refuses to.
        if interrupts(error):
            raise
        return otherwise


def call_native(thing: object, cls: type, name: str, *args: object) -> Any:
    """What a method that a class has in C returns for an object of it; None without one."""
    method = class_value(cls, name)
    return method(thing, *args) if is_a(thing, cls) and is_exactly(method, _METHODS) else None


# Where libraries store what they wrap, from the outermost to the socket.
_WRAPPED = (
    "_sock",
    "sock",
    "socket",
    "_raw_socket",
    "_writer",
    "_transport",
    "transport",
    "_ssl_protocol",
    "_stream",
    "transport_stream",
    "_network_stream",
    "dbapi_connection",
    "_connection",
    "pgconn",
)
_MAX_LAYERS = 40


def layers_of(connection: object) -> Iterator[Any]:
    """A connection, what it wraps, and so on: the socket comes last, if there is one."""
    waiting = deque([connection])
    for _ in range(_MAX_LAYERS):
        if not waiting:
            break
        thing = waiting.popleft()
        yield thing
        further = (field(thing, name) for name in _WRAPPED)
        waiting += [each for each in further if each is not None]
