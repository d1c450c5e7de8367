"""Where a reference path may end: a module global, local variable, class, thread, task, fixture.

And what stands for one where no object does: a process that has a copy, the number's next owner.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from functools import partial
from heapq import nlargest
from itertools import islice
from operator import itemgetter
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from closewait_guard._capture import SERIAL, SOCK, Registry
from closewait_guard._cpython import (
    HANDLE_CALLBACK,
    LOOP_WAKERS,
    NSIG,
    TASK_COROUTINE,
    TASK_NAME,
    THREAD_NAME,
    getsignal,
    threads,
)
from closewait_guard._descriptors import sockets_of_process
from closewait_guard._holders.threads import (
    Call,
    Local,
    current_calls,
    describe_calls,
    greenlet_name,
    make_call,
    running_locals,
)
from closewait_guard._inspect import kind_of, peer_of, record_of
from closewait_guard._live import (
    call_native,
    field,
    find_classes,
    is_a,
    is_finished,
    loaded_modules,
    module_dict,
    module_name,
    mro_of,
    native_field,
    number_of,
    suspended_frames,
    text_of,
    type_qualname,
    value_at,
)
from closewait_guard._threads import descendants_of
from closewait_guard.model import FrameKind, Observation, Origin

__all__ = [
    "FALLBACK",
    "OWN",
    "Root",
    "Roots",
    "describe_makings",
    "describe_reuse",
    "find_successors",
    "modules_of",
    "processes_sharing",
    "suspended_calls",
]


# The program's own; a library's; one to use only if there is no better.
OWN, FOREIGN, FALLBACK = 0, 1, 2
# Of the processes that may share a socket.
_MAX_PROCESSES = 64
# It adopts every orphan: what is below it need not be related.
_INIT = 1
_MAX_DESCRIPTORS = 20_000


class Root(NamedTuple):
    """An end of a path.

    Attributes:
        rank: OWN, FOREIGN or FALLBACK.
        expression: What stands before the first attribute of the path.
        template: The sentence, with `{}` for the path.
        thread: Which thread's local variable it is.
        is_barrier: Its referrers are of no interest, but for what is in `parts`.
        parts: The objects, by identity, that belong to the end itself.
        is_namespace: It is a dict whose keys are names.
    """

    rank: int
    expression: str
    template: str
    thread: int | None = None
    is_barrier: bool = True
    is_namespace: bool = False
    parts: frozenset[int] = frozenset()


class Roots:
    """The ends of paths at one moment. Plain data, except for the classes that it looks for.

    Args:
        with_values: Keep the values of the variables of running calls too, to start from them.

    Attributes:
        values: The values in the program's own calls, and those in calls of libraries.
        has_all_calls: Whether the variables of all running calls were looked at.
    """

    def __init__(self, *, with_values: bool = False) -> None:
        self.values: tuple[list[object], list[object]] = ([], [])
        self._locals, self.has_all_calls = running_locals(self.values if with_values else None)
        modules = loaded_modules()
        # Kept so that starting from the modules does not list them all again.
        self._spaces = modules if with_values else []
        # Under the first name: libraries give modules of others names of their own, as aliases.
        self._modules = {id(variables): name for name, variables in reversed(modules)}
        self._kinds = {id(cls): (cls, _KINDS[name]) for name, cls in find_classes(_KINDS).items()}
        # Those that are no functions are numbers and None.
        self._signals = {id(getsignal(number)): number for number in range(1, NSIG)}

    def namespaces(self) -> tuple[list[object], list[object]]:
        """The namespaces of the program's own modules, and those of others."""
        found: tuple[list[object], list[object]] = ([], [])
        for name, variables in self._spaces:
            found[_rank_at(name, variables) != OWN].append(variables)
        return found

    def of(self, thing: object) -> Root | None:
        """The end that an object is, if it is one."""
        if type(thing) is dict and id(thing) in self._modules:
            name = self._modules[id(thing)]
            return Root(_rank_at(name, thing), name, "{} (module global)", is_namespace=True)
        signum = self._signals.get(id(thing))
        if signum is not None:
            return _handler(thing, signum)
        local, root = self._locals.get(id(thing)), self._of_kind(thing)
        if local is None or (root is not None and (root.rank == OWN or local.is_library)):
            return root
        return _root_of_local(local)

    def _of_kind(self, thing: Any) -> Root | None:
        if is_a(thing, type):
            return self._class(thing)
        for each in mro_of(type(thing)):
            known = self._kinds.get(id(each))
            if known is not None:
                cls, make_root = known
                return make_root(thing, cls)
        return None

    def _class(self, cls: type) -> Root:
        module = module_name(cls) or "?"
        if module == "weakref" and type_qualname(cls) == "finalize":
            return _FINALIZER
        variables = module_dict(sys.modules.get(module))
        rank = OWN if variables is None else _rank_at(module, variables)
        return Root(rank, f"{module}.{type_qualname(cls)}", "{} (class attribute)")


# What weakref keeps in a table of its own says nothing of who waits for whom.
_FINALIZER = Root(
    FALLBACK, "", "only a weakref.finalize() callback, which waits for another object to go"
)


def _rank_at(name: str, variables: dict[str, Any]) -> int:
    """The rank of a module, remembered as long as its namespace is the same."""
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


def _root_of_local(local: Local) -> Root:
    function = f"{local.function}()".replace(">()", ">")
    now = (
        f", now at {describe_calls(current_calls(local.thread))}"
        if local.thread is not None
        else ""
    )
    what = f"local {local.name!r}" if local.name else "a `with`, `for` or `try`"
    template = f"{what} of {function} in {local.runner}{now}"
    rank = FOREIGN if local.is_library else OWN
    return Root(rank, local.name, template + ": {}", local.thread, is_barrier=not local.is_library)


def modules_of(kind: FrameKind) -> dict[str, dict[str, Any]]:
    """The variables of each module that is a library's, or the program's own."""
    return {
        module: variables
        for module, variables in loaded_modules()
        if (filename := text_of(value_at(variables, "__file__"))) is not None
        and kind_of(filename) is kind
    }


def _asyncio_task(task: Any, cls: type) -> Root | None:
    if is_finished(task, cls):
        return None
    if cls.__module__ == "_asyncio":
        name, coroutine = call_native(task, cls, "get_name"), call_native(task, cls, "get_coro")
    else:
        name, coroutine = field(task, TASK_NAME), field(task, TASK_COROUTINE)
    return Root(OWN, "", f"task {text_of(name)!r} {_describe_suspended(coroutine)}: {{}}")


def _trio_task(task: Any, _: type) -> Root | None:
    name = text_of(field(task, "name"))
    return Root(OWN, "", f"task {name!r} {_describe_suspended(field(task, 'coro'))}: {{}}")


def _describe_suspended(coroutine: Any) -> str:
    calls = suspended_calls(coroutine)
    return f"suspended at {describe_calls(calls)}" if calls else "not begun"


def suspended_calls(awaited: Any) -> list[Call]:
    """The calls of a suspended coroutine or generator, innermost first."""
    return [make_call(frame.f_code, frame.f_lineno) for frame in suspended_frames(awaited)]


def _thread(thread: Any, _: type) -> Root | None:
    if threads and not any(each is thread for each in threads.copy().values()):
        # It has ended or not started: what keeps the thread keeps its arguments.
        return None
    return Root(OWN, "thread", f"{{}} (arguments of thread {text_of(field(thread, THREAD_NAME))})")


def _greenlet(greenlet: Any, _: type) -> Root:
    return Root(FOREIGN, "greenlet", f"{{}} ({greenlet_name(greenlet)})")


def _handle(handle: Any, _: type) -> Root:
    callback = field(handle, HANDLE_CALLBACK)
    callback = native_field(callback, partial, "func", callback)
    callback = native_field(callback, MethodType, "__func__", callback)
    name = text_of(native_field(callback, FunctionType, "__qualname__"))
    calls = f" to call {name}()" if name is not None else ""
    return Root(FALLBACK, "", f"only the event loop, which waits{calls}")


def _handler(handler: Any, signum: int) -> Root:
    """A handler of a signal, which native code holds."""
    # It makes an enumeration, and few programs have such a handler.
    from signal import Signals

    names = {each.value: each.name for each in Signals}
    expression = "handler.__self__" if is_a(handler, MethodType) else "handler"
    template = f"the handler of signal {names.get(signum, signum)}: {{}}"
    return Root(FALLBACK, expression, template, is_barrier=False)


def _loop(loop: Any, _: type) -> Root:
    # What keeps a loop keeps its own sockets, but not those of all its users.
    parts = frozenset(id(field(loop, name)) for name in LOOP_WAKERS)
    return Root(FALLBACK, "loop", "{} (the event loop)", parts=parts)


def _log_record(record: Any, _: type) -> Root:
    logger, path = text_of(field(record, "name")), text_of(field(record, "pathname")) or "?"
    # pathlib is slow to load.
    place = f"{os.path.basename(path)}:{number_of(field(record, 'lineno'))}"  # noqa: PTH119
    template = f"{{}} (a log record of logger {logger!r}, made at {place})"
    return Root(FALLBACK, "record", template, is_barrier=False)


def _context(*_: Any) -> Root:
    return Root(FOREIGN, "", "a context variable: {}")


def _test(item: Any, _: type) -> Root:
    name = text_of(field(item, "name"))
    return Root(FOREIGN, "item", f"{{}} (what pytest keeps of {name})")


def _fixture(definition: Any, _: type) -> Root:
    return Root(FOREIGN, "", f"fixture {text_of(field(definition, 'argname'))!r}: {{}}")


# Each function gets the object and the class of it that is listed here.
_KINDS: dict[str, Callable[[Any, type], Root | None]] = {
    "asyncio:Task": _asyncio_task,
    "trio._core._run:Task": _trio_task,
    "threading:Thread": _thread,
    "greenlet:greenlet": _greenlet,
    "asyncio.events:Handle": _handle,
    "asyncio.events:AbstractEventLoop": _loop,
    "logging:LogRecord": _log_record,
    "contextvars:Context": _context,
    "_pytest.python:Function": _test,
    "_pytest.fixtures:FixtureDef": _fixture,
}


def describe_reuse(fd: int) -> str:
    """What a descriptor that was closed elsewhere refers to now, in place of a holder."""
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - pathlib is slow to load
    except OSError:
        return f"nothing: descriptor {fd} is closed"
    return f"nothing: descriptor {fd} is now {target}"


def processes_sharing(observations: Collection[Observation]) -> dict[int, list[str]]:
    """By inode, the other processes that have the sockets open, as sentences. Linux only.

    The parent and its other children may have those that came through a fork.
    """
    of_parent = any(each.record.origin is Origin.INHERITED for each in observations)
    inodes = {each.inode for each in observations if each.inode}
    found: dict[int, list[str]] = {}
    own, parent = os.getpid(), os.getppid()
    processes = [parent] if of_parent else []
    related = [own] if parent == _INIT else [*processes, own]
    with suppress(OSError):
        for each in related:
            processes += descendants_of(each, _MAX_PROCESSES)
    for pid in islice(dict.fromkeys(processes), _MAX_PROCESSES):
        if pid != own:
            for inode in inodes & _sockets_of(pid):
                found.setdefault(inode, []).append(
                    f"process {pid} ({_command(pid)}) too, as a copy"
                )
    return found


def _sockets_of(pid: int) -> set[int]:
    with suppress(OSError):
        return set(sockets_of_process(pid, at_most=_MAX_DESCRIPTORS)[1].values())
    return set()


def _command(pid: int) -> str:
    # Not the `open` of builtins, which a test may have replaced.
    with suppress(OSError), io.open(f"/proc/{pid}/comm", "rb") as file:  # noqa: UP020
        return file.read().decode(errors="replace").strip()
    return "gone"


def describe_makings(observations: Iterable[Observation], registry: Registry) -> dict[int, str]:
    """By serial, where the session, client or loop was made that is to close the socket."""
    table = registry.owners
    if table is None:
        return {}
    records = {
        each.record.serial: each.record
        for each in observations
        if each.owner is None and each.checkout is None
    }
    found: dict[int, str] = {}
    for owner, entry in table.open_owners() if records else ():
        # One may be in the middle of something.
        with suppress(Exception):
            for sock in table.sockets_of(owner, entry.kind):
                record = records.get(sock.serial) if sock.serial is not None else None
                made_at = record_of(entry.creation, registry.pid).site
                if record is not None and made_at is not None and made_at != record.site:
                    found[record.serial] = f"its {entry.kind.name} was made at {made_at.call}"
    return found


# Of all sockets opened since, only the newest are compared.
_MAX_NEWER_SOCKETS = 200
# A successor is opened at least so long after the end: calls in quick succession do not replace
# each other, and the time of the end depends on kernel ticks and on an earlier probe.
_MIN_GAP = 0.1


def find_successors(
    ended: Iterable[Observation], registry: Registry, wall: float
) -> dict[int, int]:
    """By serial, the newest socket that the same line has connected to the same peer since the end.

    Args:
        ended: Sockets whose connections have ended.
        registry: Has the sockets opened since.
        wall: The time of the observations, in seconds since the epoch.
    """
    old = {
        observation.record.serial: (
            wall - observation.ended_for + _MIN_GAP,
            observation.peer,
            observation.record.site,
        )
        for observation in ended
        if observation.record.origin is Origin.CREATED and observation.peer
    }
    if not old:
        return {}
    found: dict[int, int] = {}
    open_sockets = registry.open_sockets().creations.values()
    for creation in nlargest(_MAX_NEWER_SOCKETS, open_sockets, key=itemgetter(SERIAL)):
        sock, record = creation[SOCK](), record_of(creation, registry.pid)
        peer, opened_at = peer_of(sock) if sock is not None else None, record.opened_at or 0.0
        for serial, (end, to, site) in old.items():
            is_newer = record.serial > serial and opened_at > end
            if is_newer and peer == to and record.site == site:
                found.setdefault(serial, record.serial)
    return found
