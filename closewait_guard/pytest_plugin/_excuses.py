"""Why an open socket need not be a leak of its test.

A pattern ignores it, a failure, a record of what happened, a wider fixture or a library's own pool
keeps it, or an event loop that does not run, or a thread that still does, has yet to close it.
"""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from types import FrameType
from typing import Any

from closewait_guard._capture import Creation
from closewait_guard._clock import TimeLimit
from closewait_guard._cpython import (
    LOOP_CALLS,
    LOOP_SELECTOR,
    LOOP_WAKERS,
    THREAD_NAME,
    has_gil,
    running_loop,
    threads,
)
from closewait_guard._holders import idle_pools
from closewait_guard._inspect import resolve
from closewait_guard._live import (
    derives_from,
    field,
    find_classes,
    instances_of,
    is_any_of,
    items_of,
    kinds_of,
    loaded,
    locals_of,
    locals_of_other_thread,
    module_name,
    running_frames,
    shows_other_threads,
    text_of,
    unnamed_values_of,
    value_at,
)
from closewait_guard.model import Finding, Frame, Observation, Origin, SocketRecord

__all__ = [
    "IdleEventLoops",
    "copies_in_use",
    "find_running",
    "is_below",
    "is_ignored",
    "is_of_default_loop",
    "kept_by_records",
    "kept_by_responses",
    "nearest_target",
    "note_on_searches",
    "note_unfinished_search",
    "reachable",
]


def is_ignored(record: SocketRecord, fixture: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the file, the function or the module of any call that opened it.

    Or the wider fixture that it belongs to, as `fixture:NAME`.
    """
    if fixture and any(fnmatchcase(f"fixture:{fixture}", pattern) for pattern in patterns):
        return True
    frames = {*record.stack, *record.opener.stack, *record.blamed.stack}
    return any(_matches(frame, pattern) for frame in frames for pattern in patterns)


def _matches(frame: Frame, pattern: str) -> bool:
    filename = frame.filename.replace("\\", "/")
    names = (frame.module, frame.function, frame.function.rpartition(".")[2], filename)
    return any(fnmatchcase(name, pattern) for name in names) or fnmatchcase(
        filename, f"*/{pattern}"
    )


def is_of_default_loop(record: SocketRecord) -> bool:
    """Whether asyncio made it for the loop that it gives a thread which asks and has none.

    That loop is the thread's own and stays for the next call.
    """
    return any(
        frame.module == "asyncio.events" and frame.function.endswith("Policy.get_event_loop")
        for frame in record.opener.stack
    )


def is_below(creation: Creation, functions: frozenset[tuple[str, str]]) -> bool:
    """Whether it was opened below one of the functions, each a file and a name."""
    return bool(functions) and any(
        (frame.filename, frame.function) in functions for frame in resolve(creation.stack)
    )


# What log capture, `pytest.raises` and reports note of what has happened. Each keeps arguments, or
# an exception and, through its traceback, the variables of every call in it.
_RECORDS = (
    "logging:LogRecord",
    "warnings:WarningMessage",
    "_pytest._code.code:ExceptionInfo",
    "_pytest.reports:BaseReport",
    "_pytest.runner:CallInfo",
)


_IN_RECORD = "a record of a log, a warning or an exception keeps it"


def kept_by_records(targets: dict[int, int]) -> set[int]:
    """Which of the targets a record keeps, that is not the test's own to let go of: their keys."""
    records = instances_of(loaded(_RECORDS)) if targets else []
    return reachable(itertools.chain.from_iterable(map(gc.get_referents, records)), targets)


def kept_by_responses(roots: Iterable[object], seen: Iterable[Observation]) -> set[int]:
    """Which sockets wait in a pool that the roots keep only by a response: their serials.

    Its session or client has been closed, and nothing but letting go of the response closes it.
    """
    pools = idle_pools(seen)
    targets, roots = {pool: pool for pool in pools}, list(roots) if pools else []
    names = [name for _, kind in pools.values() for name in kind.kept_by]
    kept = reachable(roots, targets) - reachable(roots, targets, loaded(names))
    return set().union(*(pools[pool][0] for pool in kept))


def _variables_of(trace: types.TracebackType) -> Iterable[object]:
    frame: FrameType = trace.tb_frame
    module = text_of(value_at(frame.f_globals, "__name__")) or ""
    if module.startswith(("_pytest.", "pluggy.")):
        return ()
    if frame.f_code.co_name == "<module>":
        return [value for _, value in items_of(frame.f_globals)]
    return locals_of(frame).values()


_MAX_OBJECTS = 200_000
_MAX_SECONDS = 0.5
_OBJECTS_PER_CLOCK_READING = 1024
_MAX_NAMES = 100

# What leads to everything, or nowhere.
_DEAD_ENDS = (
    type,
    str,
    bytes,
    int,
    float,
    types.ModuleType,
    types.CodeType,
    types.FrameType,
)
# The policy keeps the loop that was set last, whoever set it.
_POLICY_CLASSES = ("asyncio:AbstractEventLoopPolicy", "asyncio.events:_AbstractEventLoopPolicy")
# Event loops, and the selectors in which they keep the sockets of all their users.
_LOOP_CLASSES = ("asyncio:AbstractEventLoop", "selectors:BaseSelector")
# pytest's objects lead from any fixture to the test that runs, and to what is the test's own.
_PYTEST_PACKAGES = ("_pytest", "pytest", "pluggy", "xdist", "pytest_asyncio", "closewait_guard")


# A name, and the objects to walk from.
_Group = tuple[str, Iterable[object]]


def reachable(
    roots: Iterable[object], targets: dict[int, int], without: Sequence[type] = ()
) -> set[int]:
    """Which of the targets (by `id()` of the object, each with a key) can be reached: their keys.

    Walks forward from the roots, bounded in count and time. An event loop knows the sockets of all
    its users, so it keeps only its own. A traceback keeps the variables of its calls. No way leads
    through an object of the classes `without`.
    """
    return set(_nearest([("", roots)], targets, without))


def nearest_target(root: object, targets: dict[int, int]) -> int | None:
    """The key of the target that is the fewest references away from an object, if any is."""
    keys = (targets.get(id(thing)) for _, thing in _walk([("", [root])], ()))
    return next((key for key in keys if key is not None), None)


def _nearest(
    groups: Sequence[_Group], targets: dict[int, int], without: Sequence[type] = ()
) -> dict[int, str]:
    """By key of each target that can be reached, the name of the group that is nearest to it."""
    found: dict[int, str] = {}
    wanted = len(set(targets.values()))
    for name, thing in _walk(groups, without):
        key = targets.get(id(thing))
        if key is not None:
            found.setdefault(key, name)
            if len(found) == wanted:
                break
    return found


# One for each search that a limit has ended, and of which nothing has been said yet.
_unfinished: list[None] = []


def note_unfinished_search() -> None:
    """A limit has ended a search: `note_on_searches` is to say so."""
    _unfinished.append(None)


def note_on_searches() -> tuple[str, ...]:
    """What to say of the searches that a limit has ended since this was last asked."""
    if not _unfinished:
        return ()
    _unfinished.clear()
    limit = f"the limit of {_MAX_OBJECTS:,} objects or {_MAX_SECONDS} s"
    return (f"what else may keep the sockets of a test: the search ended at {limit}",)


def _walk(groups: Sequence[_Group], without: Sequence[type]) -> Iterator[tuple[str, object]]:
    # From all groups at once: what many of them share is passed through once.
    queue = deque((name, thing) for name, roots in groups for thing in roots)
    visited = {id(thing) for _, thing in queue}
    traits, limit = _ClassTraits(without), TimeLimit(_MAX_SECONDS)
    for count in itertools.count():
        if not queue:
            return
        is_over = count % _OBJECTS_PER_CLOCK_READING == 0 and limit.is_over()
        if is_over or count >= _MAX_OBJECTS * len(groups):
            note_unfinished_search()
            return
        name, thing = queue.popleft()
        yield name, thing
        for further in _children(thing, traits):
            if id(further) not in visited:
                visited.add(id(further))
                queue.append((name, further))


def _children(thing: Any, traits: _ClassTraits) -> Iterable[object]:
    kind = type(thing)
    if traits.is_dead_end(kind):
        return ()
    if traits.is_loop(kind):
        return [field(thing, name) for name in LOOP_WAKERS]
    if kind is types.TracebackType:
        return (thing.tb_next, *_variables_of(thing))
    if kind is types.FunctionType:
        return (thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__)
    if kind is dict and _is_module_namespace(thing):
        return ()
    return gc.get_referents(thing) if has_gil() else ()


class _ClassTraits:
    """What the classes met on one walk are, each examined once."""

    def __init__(self, without: Sequence[type]) -> None:
        # The class is kept, so that its identity stays its own.
        self._known: dict[int, tuple[type, bool, bool]] = {}
        self._loops = list(find_classes(_LOOP_CLASSES).values())
        self._dead_ends = (*_DEAD_ENDS, *without, *find_classes(_POLICY_CLASSES).values())

    def is_dead_end(self, kind: type) -> bool:
        return self._examine(kind)[1]

    def is_loop(self, kind: type) -> bool:
        return self._examine(kind)[2]

    def _examine(self, kind: type) -> tuple[type, bool, bool]:
        known = self._known.get(id(kind))
        if known is None:
            is_dead_end = _is_of_pytest(kind) or derives_from(kind, self._dead_ends)
            known = self._known[id(kind)] = (kind, is_dead_end, derives_from(kind, self._loops))
        return known


def _is_of_pytest(kind: type) -> bool:
    package = (module_name(kind) or "").partition(".")[0]
    return package in _PYTEST_PACKAGES and not derives_from(kind, [BaseException])


def _is_module_namespace(variables: dict[Any, Any]) -> bool:
    """Whether a dict holds globals: the import system, or `exec`, has set a name early on."""
    names = list(itertools.islice(variables, _MAX_NAMES))
    return any(type(name) is str and name == "__builtins__" for name in names)


class IdleEventLoops:
    """The idle event loops that know a suspect.

    After `transport.close()` a socket stays open until the loop has called back, and between two
    tests nothing runs the loop of a wider fixture.

    Args:
        targets: The suspects: the address of each socket, and a key.
    """

    def __init__(self, targets: dict[int, int]) -> None:
        self._targets = targets
        self._loops: list[weakref.ref[Any]] | None = None

    def run_once(self) -> None:
        """Let each close what it has been asked to close."""
        asyncio = sys.modules.get("asyncio")
        if asyncio is None or running_loop() is not None:
            return
        if self._loops is None:
            # By weak reference: a loop that is garbage is to be collected while we wait.
            self._loops = [weakref.ref(loop) for loop in _idle_loops(asyncio) if self._knows(loop)]
        for reference in self._loops:
            loop = reference()
            if loop is not None and _is_idle(loop):
                loop.call_soon(loop.stop)
                loop.run_forever()

    def _knows(self, loop: Any) -> bool:
        return bool(reachable(_parts_of(loop), self._targets))


def _parts_of(loop: Any) -> list[Any]:
    """What a loop knows, also of its users."""
    parts = (loop, field(loop, LOOP_SELECTOR))
    known = [each for part in parts if part is not None for each in gc.get_referents(part)]
    # uvloop's transports are kept by libuv alone until they are closed.
    weak = [each for each in known if type(each) is weakref.WeakValueDictionary]
    return known + [thing for each in weak for ref in each.valuerefs() if (thing := ref())]


def _idle_loops(asyncio: Any) -> Iterator[Any]:
    return filter(_is_idle, _all_loops(asyncio))


def _all_loops(asyncio: Any) -> list[Any]:
    return list(instances_of(kinds_of(asyncio.AbstractEventLoop)))


def _is_idle(loop: Any) -> bool:
    return not loop.is_closed() and not loop.is_running()


def find_running(
    targets: dict[int, int], opened_in: dict[int, str], *, with_records: bool
) -> dict[int, str]:
    """By key: what still runs and holds one of the targets, as a sentence.

    A thread does by the variables of its calls, what it was started with, and the loop that it
    runs; an open loop of another owner by what it has been asked to call.

    Args:
        targets: The addresses of sockets, and a key for each.
        opened_in: By key the name of the thread that made it, which stands in where Python does not
            show the variables of other threads.
        with_records: Name what records keep, too: at the end of the run no record is pytest's.
    """
    calls = list(_running_threads()) if targets else []
    users = [*calls, *_running_loops(calls), *_loops_with_calls(targets)] if targets else []
    found = _nearest(users, targets)
    if with_records:
        found = dict.fromkeys(kept_by_records(targets), _IN_RECORD) | found
    if not shows_other_threads():
        names = {_name_of(ident): ident for ident in threads if ident != threading.get_ident()}
        for key, name in opened_in.items():
            if name in names:
                found.setdefault(key, _sentence_of(names[name]))
    return found


def copies_in_use(findings: Iterable[Finding]) -> dict[int, str]:
    """By serial: the child process that may use its copy of what the parent has closed."""
    return {
        each.observation.record.serial: f"{each.holders[0]} still runs and has a copy"
        for each in findings
        if each.observation.record.origin is Origin.INHERITED and not each.is_leak and each.holders
    }


def _running_threads() -> Iterator[_Group]:
    loops = list(find_classes(_LOOP_CLASSES[:1]).values())
    calls = running_frames()
    # A call that holds itself would keep what it has found.
    calls.pop(threading.get_ident(), None)
    while calls:
        ident, call = calls.popitem()
        variables = _variables_of_calls(call)
        del call
        parts = [_parts_of(each) if is_any_of(each, loops) else [each] for each in variables]
        yield _sentence_of(ident), [threads.get(ident), *itertools.chain.from_iterable(parts)]


def _variables_of_calls(call: FrameType | None) -> list[object]:
    found: list[object] = []
    while call is not None:
        found += locals_of_other_thread(call).values()
        found += unnamed_values_of(call)
        call = call.f_back
    return found


def _running_loops(calls: Sequence[_Group]) -> Iterator[_Group]:
    """The loops of other threads. Of one in C, as uvloop's, no call says in which thread it runs.

    Args:
        calls: What the calls of threads have.
    """
    asyncio = sys.modules.get("asyncio")
    loops = [] if asyncio is None else [each for each in _all_loops(asyncio) if each.is_running()]
    nearest = _nearest(calls, {id(loop): id(loop) for loop in loops}) if loops else {}
    for loop in loops:
        if loop is not running_loop():
            yield nearest.get(id(loop), "an event loop still runs and holds it"), _parts_of(loop)


def _loops_with_calls(targets: dict[int, int]) -> Iterator[_Group]:
    asyncio = sys.modules.get("asyncio")
    for loop in _idle_loops(asyncio) if asyncio is not None else ():
        if not any(id(field(loop, name)) in targets for name in LOOP_WAKERS):
            calls = [field(loop, name) for name in LOOP_CALLS]
            yield "an event loop that is still open has yet to call what holds it", calls


def _sentence_of(ident: int) -> str:
    return f"thread {_name_of(ident)} still runs and holds it"


def _name_of(ident: int) -> str:
    return text_of(field(threads.get(ident), THREAD_NAME)) or str(ident)
