"""Objects of hostile classes: whatever of theirs is evaluated notes its name, and raises."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections import OrderedDict, deque

evaluated: list[str] = []
# The zoo itself needs some of it while it is built.
armed = threading.Event()


class EvaluatedError(Exception):
    """Never to be seen."""


def trap(name, harmless):
    def evaluate(*args, **kwargs):
        if armed.is_set():
            evaluated.append(name)
            raise EvaluatedError(name)
        return harmless(*args, **kwargs)

    return evaluate


OPERATIONS = (
    *("__eq__", "__ne__", "__hash__", "__repr__", "__str__", "__format__", "__bool__", "__len__"),
    *("__iter__", "__contains__", "__getitem__", "__getattr__", "__getattribute__", "__get__"),
    *("__instancecheck__", "__subclasscheck__", "__dir__", "__lt__", "__index__", "__int__"),
    *("__next__", "__call__", "__reduce_ex__", "__sizeof__", "keys", "values", "items", "get"),
    *("copy", "mro", "fileno"),
)


def traps(base, *, without=()):
    """Methods that are as those of a base while the zoo is built."""
    found = {}
    for name in OPERATIONS:
        harmless = getattr(base, name, None)
        if callable(harmless) and name not in without:
            found[name] = trap(f"{base.__name__}.{name}", harmless)
    return found


def lying(base, name="lies"):
    """A `__class__` that is evaluated."""
    return property(trap(f"{base.__name__}.{name}", lambda self: base))


class UnhashableMeta(type):
    __eq__ = trap("meta.__eq__", type.__eq__)
    __hash__ = None
    __instancecheck__ = trap("meta.__instancecheck__", type.__instancecheck__)
    __subclasscheck__ = trap("meta.__subclasscheck__", type.__subclasscheck__)
    __getattribute__ = trap("meta.__getattribute__", type.__getattribute__)
    __repr__ = trap("meta.__repr__", type.__repr__)
    __bool__ = trap("meta.__bool__", lambda cls: True)


def hostile(base, **more):
    """A subclass that traps everything, by a metaclass that does so too."""
    if type(base) is not type:
        return types.new_class("Hostile", (base,), {}, lambda names: names.update(more))
    names = {**traps(base), "__class__": lying(base), "__module__": "app.zoo", **more}
    return UnhashableMeta("Hostile" + base.__name__.title(), (base,), names)


class Name(str):  # noqa: SLOT000
    """A name that is compared with nothing, and of which nothing is asked."""

    __eq__ = trap("name.__eq__", str.__eq__)
    __hash__ = trap("name.__hash__", str.__hash__)
    __format__ = trap("name.__format__", str.__format__)
    __str__ = trap("name.__str__", str.__str__)
    __repr__ = trap("name.__repr__", str.__repr__)


def attribute(sock):
    thing = object.__new__(hostile(object))
    object.__setattr__(thing, "held", sock)
    return thing


def own_dict(sock):
    thing = object.__new__(hostile(object, __dict__=property(trap("__dict__", dict))))
    object.__setattr__(thing, "held", sock)
    return thing


def slots(sock):
    cls = hostile(object, __slots__=("größe", "_private", "held"))
    thing = object.__new__(cls)
    object.__setattr__(thing, "held", sock)
    return thing


def dict_with_a_lock(sock):
    return hostile(dict)(held=sock)


def ordered(sock):
    return hostile(OrderedDict)(held=sock)


def list_that_blocks(sock):
    return hostile(list)([None, sock])


def tuple_of_its_own(sock):
    return hostile(tuple)((None, sock))


def deque_of_its_own(sock):
    return hostile(deque)((None, sock))


def in_a_set(sock):
    thing = hostile(set, __hash__=None)()
    set.add(thing, closure(sock))
    return thing


def hostile_keys(sock):
    return {Name("__builtins__"): None, Name("held"): sock, Name("__dict__"): None}


def keys_of_the_instance(sock):
    thing = types.SimpleNamespace()
    thing.__dict__.update({Name("held"): None, Name("__file__"): None})
    thing.sock = sock
    return thing


def beside_proxies(sock):
    thing = hostile(object)
    alive = object.__new__(thing)
    kept.append(alive)
    return [weakref.proxy(alive), alive, sock]


kept: list[object] = []


def partial(sock):
    return hostile(functools.partial, args=property(trap("args", lambda self: ())))(print, sock)


def exception(sock):
    cls = hostile(Exception, args=property(trap("args", lambda self: ())))
    error = cls.__new__(cls)
    BaseException.__setattr__(error, "held", sock)
    return error


def module(sock):
    thing = hostile(types.ModuleType)("app.inner")
    types.ModuleType.__setattr__(thing, "held", sock)
    return thing


def generator(sock):
    def waits(given):
        hidden = given
        yield
        return hidden

    thing = waits(sock)
    next(thing)
    return thing


def closure(sock):
    def function():
        return sock

    function.__qualname__ = Name("function")
    return function


def method(sock):
    return types.MethodType(print, attribute(sock))


def descriptor(sock):
    return type("Described", (), {"held": attribute(sock), "__module__": Name("app")})


def named_tuple_that_lies(sock):
    cls = hostile(tuple, _fields=(Name("first"), Name("held")))
    return cls((None, sock))


def odd_names(sock):
    return {"": {"\x1b[31m": {"a" * 500: {0.5: {(1, ("x",)): {None: {b"": sock}}}}}}}


def thread(sock):
    cls = hostile(threading.Thread, name=property(trap("name", lambda self: "x"), lambda *_: None))
    thing = cls.__new__(cls)
    thing.__dict__.update(_name="odd", _args=(sock,))
    return thing


KEEPERS = [
    attribute,
    own_dict,
    slots,
    dict_with_a_lock,
    ordered,
    list_that_blocks,
    tuple_of_its_own,
    deque_of_its_own,
    in_a_set,
    hostile_keys,
    keys_of_the_instance,
    beside_proxies,
    partial,
    exception,
    module,
    generator,
    closure,
    method,
    descriptor,
    named_tuple_that_lies,
    odd_names,
    thread,
]
