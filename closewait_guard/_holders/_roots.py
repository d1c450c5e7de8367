"""Where a path of references may end: what a person would call the holder."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType
from typing import Any, NamedTuple

from closewait_guard._frames import kind_of
from closewait_guard._holders._anatomy import kin_of
from closewait_guard._holders._threads import (
    Call,
    Local,
    current_calls,
    greenlet_name,
    running_locals,
    where,
)
from closewait_guard.model import FrameKind

__all__ = ["FALLBACK", "OWN", "Root", "Roots"]

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
    """The ends of one moment. Plain data, but for the classes that it looks for."""

    def __init__(self) -> None:
        self._locals = running_locals()
        self._modules = {
            id(vars(module)): (name, _rank_of(module))
            for name, module in list(sys.modules.items())
            if isinstance(module, ModuleType)
        }
        self._kinds = {
            cls: tell
            for module, name, tell in _KINDS
            if isinstance(cls := getattr(sys.modules.get(module), name, None), type)
        }

    def of(self, thing: object) -> Root | None:
        """The end that an object is, if it is one."""
        if type(thing) is dict and id(thing) in self._modules:
            name, rank = self._modules[id(thing)]
            return Root(rank, name, "{} (module global)", is_namespace=True)
        local, root = self._locals.get(id(thing)), self._of_kind(thing)
        if local is None or (root is not None and (root.rank == OWN or local.is_library)):
            return root
        return _local(local)

    def _of_kind(self, thing: Any) -> Root | None:
        kin = kin_of(thing)
        if type in kin:
            return _class(thing)
        tell = next((self._kinds[cls] for cls in kin if cls in self._kinds), None)
        return None if tell is None else tell(thing)


def _rank_of(module: ModuleType) -> int:
    filename = vars(module).get("__file__")
    if isinstance(filename, str):
        return OWN if kind_of(filename) is FrameKind.USER else FOREIGN
    return OWN if vars(module).get("__name__") == "__main__" else FOREIGN


def _local(local: Local) -> Root:
    function = f"{local.function}()".replace(">()", ">")
    now = f", now at {where(current_calls(local.thread))}" if local.thread is not None else ""
    told = f"local {local.name!r} of {function} in {local.runner}{now}"
    rank = FOREIGN if local.is_library else OWN
    return Root(rank, local.name, told + ": {}", local.thread, is_barrier=not local.is_library)


def _class(cls: Any) -> Root:
    module = sys.modules.get(cls.__module__)
    rank = _rank_of(module) if module is not None else OWN
    return Root(rank, f"{cls.__module__}.{cls.__qualname__}", "{} (class attribute)")


def _asyncio_task(task: Any) -> Root | None:
    if task.done():
        return None
    return Root(OWN, "", f"task {task.get_name()!r} {_suspended(task.get_coro())}: {{}}")


def _trio_task(task: Any) -> Root | None:
    return Root(OWN, "", f"task {task.name!r} {_suspended(task.coro)}: {{}}")


def _suspended(coroutine: Any) -> str:
    calls = suspended_calls(coroutine)
    return f"suspended at {where(calls)}" if calls else "not begun"


def suspended_calls(awaited: Any) -> list[Call]:
    """The calls of a coroutine or generator that waits, innermost first."""
    calls: list[Call] = []
    for _ in range(100):
        frame = _attribute(awaited, "cr_frame", "gi_frame", "ag_frame")
        if frame is None:
            break
        code = frame.f_code
        calls.append(Call(code.co_qualname, code.co_filename, frame.f_lineno or 0))
        awaited = _attribute(awaited, "cr_await", "gi_yieldfrom", "ag_await")
    return calls[::-1]


def _attribute(thing: object, *names: str) -> Any:
    for name in names:
        with contextlib.suppress(Exception):
            return getattr(thing, name)
    return None


def _thread(thread: Any) -> Root:
    return Root(OWN, "thread", f"{{}} (arguments of thread {thread.name})")


def _greenlet(greenlet: Any) -> Root:
    return Root(FOREIGN, "greenlet", f"{{}} ({greenlet_name(greenlet)})")


def _handle(handle: Any) -> Root:
    callback = _attribute(handle, "_callback")
    callback = _attribute(callback, "func") or callback
    name = _attribute(callback, "__qualname__")
    calls = f" to call {name}()" if isinstance(name, str) else ""
    return Root(FALLBACK, "", f"nobody but the event loop, which waits{calls}")


def _loop(_: Any) -> Root:
    return Root(FALLBACK, "loop", "{} (the event loop)")


def _context(_: Any) -> Root:
    return Root(FOREIGN, "", "a context variable: {}")


def _test(item: Any) -> Root:
    return Root(FOREIGN, "item", f"{{}} (what pytest keeps of {item.name})")


def _fixture(definition: Any) -> Root:
    return Root(FOREIGN, "", f"fixture {definition.argname!r}: {{}}")


_KINDS = (
    ("asyncio", "Task", _asyncio_task),
    ("trio._core._run", "Task", _trio_task),
    ("threading", "Thread", _thread),
    ("greenlet", "greenlet", _greenlet),
    ("asyncio.events", "Handle", _handle),
    ("asyncio.events", "AbstractEventLoop", _loop),
    ("contextvars", "Context", _context),
    ("_pytest.python", "Function", _test),
    ("_pytest.fixtures", "FixtureDef", _fixture),
)
