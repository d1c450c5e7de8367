"""Where a path of references may end: what a person would call the holder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import (
    AsyncGeneratorType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    MethodType,
)
from typing import Any, NamedTuple

from closewait_guard._holders.threads import (
    Call,
    Local,
    call_of,
    current_calls,
    greenlet_name,
    running_locals,
    where,
)
from closewait_guard._inspect import kind_of
from closewait_guard._live import (
    call_native,
    field,
    find_classes,
    is_a,
    loaded_modules,
    module_name,
    mro_of,
    native_field,
    text_of,
    type_qualname,
    value_at,
)
from closewait_guard.model import FrameKind

__all__ = [
    "FALLBACK",
    "OWN",
    "Root",
    "Roots",
    "suspended_calls",
    "suspension_of",
]


# The program's own; somebody else's; one that only says that there is no better.
OWN, FOREIGN, FALLBACK = 0, 1, 2


class Root(NamedTuple):
    """An end of a path.

    Attributes:
        rank: OWN, FOREIGN or FALLBACK.
        expression: What stands before the first attribute of the path.
        told: The sentence, with `{}` for the path.
        thread: Which thread's local variable it is.
        is_barrier: What refers to this object is of no interest.
        is_namespace: It is a dict whose keys are names.
    """

    rank: int
    expression: str
    told: str
    thread: int | None = None
    is_barrier: bool = True
    is_namespace: bool = False


class Roots:
    """The ends of one moment. Plain data, but for the classes that it looks for.

    Args:
        with_values: Keep the values of the variables of running calls too, to begin with them.

    Attributes:
        values: Those of the program's own calls, and those of calls into libraries.
    """

    def __init__(self, *, with_values: bool = False) -> None:
        self.values: tuple[list[object], list[object]] = ([], [])
        self._locals = running_locals(self.values if with_values else None)
        modules = dict(loaded_modules())
        self._ranks = {name: _rank_at(name, variables) for name, variables in modules.items()}
        # In a list, so that no further look at all modules is needed to begin with them.
        self._spaces = list(modules.items()) if with_values else []
        self._modules = {id(variables): name for name, variables in modules.items()}
        self._kinds = {id(cls): (cls, _KINDS[name]) for name, cls in find_classes(_KINDS).items()}

    def namespaces(self) -> tuple[list[object], list[object]]:
        """The variables of the program's own modules, and those of others."""
        found: tuple[list[object], list[object]] = ([], [])
        for name, variables in self._spaces:
            found[self._ranks.get(name, FOREIGN) != OWN].append(variables)
        return found

    def of(self, thing: object) -> Root | None:
        """The end that an object is, if it is one."""
        if type(thing) is dict and id(thing) in self._modules:
            name = self._modules[id(thing)]
            return Root(self._ranks[name], name, "{} (module global)", is_namespace=True)
        local, root = self._locals.get(id(thing)), self._of_kind(thing)
        if local is None or (root is not None and (root.rank == OWN or local.is_library)):
            return root
        return _local(local)

    def _of_kind(self, thing: Any) -> Root | None:
        if is_a(thing, type):
            return self._class(thing)
        for each in mro_of(type(thing)):
            known = self._kinds.get(id(each))
            if known is not None:
                cls, tell = known
                return tell(thing, cls)
        return None

    def _class(self, cls: type) -> Root:
        module = module_name(cls) or "?"
        rank = self._ranks.get(module, OWN)
        return Root(rank, f"{module}.{type_qualname(cls)}", "{} (class attribute)")


def _rank_at(name: str, variables: dict[str, Any]) -> int:
    """That of a module, remembered for as long as it is the same."""
    known = _ranks.get(name)
    if known is None or known[0] != id(variables):
        known = _ranks[name] = id(variables), _rank_of(variables)
    return known[1]


_ranks: dict[str, tuple[int, int]] = {}


def _rank_of(variables: dict[str, Any]) -> int:
    filename = text_of(value_at(variables, "__file__"))
    if filename is not None:
        return OWN if kind_of(filename) is FrameKind.USER else FOREIGN
    return OWN if text_of(value_at(variables, "__name__")) == "__main__" else FOREIGN


def _local(local: Local) -> Root:
    function = f"{local.function}()".replace(">()", ">")
    now = f", now at {where(current_calls(local.thread))}" if local.thread is not None else ""
    told = f"local {local.name!r} of {function} in {local.runner}{now}"
    rank = FOREIGN if local.is_library else OWN
    return Root(rank, local.name, told + ": {}", local.thread, is_barrier=not local.is_library)


def _asyncio_task(task: Any, cls: type) -> Root | None:
    if cls.__module__ == "_asyncio":
        is_done = call_native(task, cls, "done")
        name, coroutine = call_native(task, cls, "get_name"), call_native(task, cls, "get_coro")
    else:
        is_done = text_of(field(task, "_state")) != "PENDING"
        name, coroutine = field(task, "_name"), field(task, "_coro")
    if is_done:
        return None
    return Root(OWN, "", f"task {text_of(name)!r} {_suspended(coroutine)}: {{}}")


def _trio_task(task: Any, _: type) -> Root | None:
    name = text_of(field(task, "name"))
    return Root(OWN, "", f"task {name!r} {_suspended(field(task, 'coro'))}: {{}}")


def _suspended(coroutine: Any) -> str:
    calls = suspended_calls(coroutine)
    return f"suspended at {where(calls)}" if calls else "not begun"


def suspended_calls(awaited: Any) -> list[Call]:
    """The calls of a coroutine or generator that waits, innermost first."""
    calls: list[Call] = []
    for _ in range(100):
        frame, further = suspension_of(awaited)
        if frame is None:
            break
        calls.append(call_of(frame.f_code, frame.f_lineno))
        awaited = further
    return calls[::-1]


def suspension_of(awaited: Any) -> tuple[FrameType | None, Any]:
    """The frame of a coroutine or generator, and what that waits for."""
    kind = type(awaited)
    if kind is CoroutineType:
        return awaited.cr_frame, awaited.cr_await
    if kind is GeneratorType:
        return awaited.gi_frame, awaited.gi_yieldfrom
    if kind is AsyncGeneratorType:
        return awaited.ag_frame, awaited.ag_await
    return None, None


def _thread(thread: Any, _: type) -> Root:
    return Root(OWN, "thread", f"{{}} (arguments of thread {text_of(field(thread, '_name'))})")


def _greenlet(greenlet: Any, _: type) -> Root:
    return Root(FOREIGN, "greenlet", f"{{}} ({greenlet_name(greenlet)})")


def _handle(handle: Any, _: type) -> Root:
    callback = field(handle, "_callback")
    callback = native_field(callback, partial, "func", callback)
    callback = native_field(callback, MethodType, "__func__", callback)
    name = text_of(native_field(callback, FunctionType, "__qualname__"))
    calls = f" to call {name}()" if name is not None else ""
    return Root(FALLBACK, "", f"nobody but the event loop, which waits{calls}")


def _loop(*_: Any) -> Root:
    return Root(FALLBACK, "loop", "{} (the event loop)")


def _context(*_: Any) -> Root:
    return Root(FOREIGN, "", "a context variable: {}")


def _test(item: Any, _: type) -> Root:
    name = text_of(field(item, "name"))
    return Root(FOREIGN, "item", f"{{}} (what pytest keeps of {name})")


def _fixture(definition: Any, _: type) -> Root:
    return Root(FOREIGN, "", f"fixture {text_of(field(definition, 'argname'))!r}: {{}}")


# Each is given the object and the class that it is known by.
_KINDS: dict[str, Callable[[Any, type], Root | None]] = {
    "asyncio:Task": _asyncio_task,
    "trio._core._run:Task": _trio_task,
    "threading:Thread": _thread,
    "greenlet:greenlet": _greenlet,
    "asyncio.events:Handle": _handle,
    "asyncio.events:AbstractEventLoop": _loop,
    "contextvars:Context": _context,
    "_pytest.python:Function": _test,
    "_pytest.fixtures:FixtureDef": _fixture,
}
