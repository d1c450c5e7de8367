"""Native sockets: those without a socket object, opened by native code or received as a number.

`attribute()` wraps the callables that open them, to record where.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from operator import is_
from types import FrameType
from typing import Any, NamedTuple, Protocol

from closewait_guard import _libraries
from closewait_guard._capture import (
    LABELS,
    NO_CONTEXT,
    NO_STACK,
    SERIAL,
    STACK,
    CapturedStack,
    Creation,
    CreationTuple,
    DroppedSocket,
    OpenSockets,
    capture,
    no_socket,
    note_task,
    patch,
    pop_if_same,
)
from closewait_guard._clock import now, wall
from closewait_guard._config import did_you_mean, shown
from closewait_guard._cpython import current_frame
from closewait_guard._descriptors import NativeListing, inode_of, sockets_besides
from closewait_guard._interruptions import interrupts
from closewait_guard._libraries import HandleKind
from closewait_guard._live import is_any_of, loaded
from closewait_guard._threads import ForkPoint
from closewait_guard.exceptions import ConfigurationError
from closewait_guard.model import Observation, Origin

__all__ = [
    "SETTLED_AFTER",
    "CallAttribution",
    "NativeSockets",
    "attributed_libraries",
    "attributed_module",
]


# The share of the time that listing the descriptors may take, unless a scan is to be full.
_MAX_CPU_SHARE = 0.002
# Seconds in which any thread has had its turn that was between two system calls.
SETTLED_AFTER = 1.0
# Standard input, output and error belong to what started this process.
_FIRST_FD = 3


class _Call(NamedTuple):
    """What is recorded of a call that opens native sockets."""

    stack: CapturedStack
    thread: str
    task: str | None
    labels: tuple[object, ...]


_UNKNOWN_CALL = _Call(NO_STACK, "", None, ())


class _Native(NamedTuple):
    """One of them: the inode distinguishes it from the next that gets its number.

    Attributes:
        since: Socket objects that were opened after this mark have had the number after it.
        seen_at: When it was found.
    """

    creation: CreationTuple
    inode: int
    since: int
    seen_at: float


class _Tracked(Protocol):
    """What is asked of the registry."""

    @property
    def pid(self) -> int: ...
    @property
    def fork(self) -> ForkPoint | None: ...

    def is_tracked(self, fd: int, since: float = ...) -> bool: ...
    def mark(self) -> int: ...
    def last_open(self) -> Iterable[CreationTuple]: ...


class NativeSockets:
    """Knows them from one census to the next, each with its creation, as far as that is known.

    Answers a scanner as the registry does. Scans and calls in several threads write to it at
    once, so each of them is written and removed by itself.
    """

    def __init__(self, tracked: _Tracked) -> None:
        self._tracked = tracked
        self._known: dict[int, _Native] = {}
        # As they were handed out last.
        self._handed_out: dict[int, CreationTuple] = {}
        self._last_serial = 0
        self._has_counted = False
        self._paused_until = 0.0
        # How many there are; None where that is not known.
        self.count: int | None = None
        # What cannot be known of where they are opened.
        self.notes: tuple[str, ...] = ()

    @property
    def pid(self) -> int:
        """The process that the registry works in."""
        return self._tracked.pid

    @property
    def fork(self) -> ForkPoint | None:
        """Where this process was forked, if it was."""
        return self._tracked.fork

    def open_sockets(self, *, thorough: bool = False) -> OpenSockets:
        """Those that are open. The descriptors are listed again when it is time to."""
        started = now()
        if thorough or started >= self._paused_until:
            self._take_census()
            done = now()
            self._paused_until = done + (done - started) / _MAX_CPU_SHARE
        if not self._known:
            return OpenSockets({}, set(), set())
        known = self._known.copy()
        for fd in [
            fd for fd, native in known.items() if self._tracked.is_tracked(fd, native.since)
        ]:
            pop_if_same(self._known, fd, known.pop(fd))
        creations = self._same_if_unchanged({fd: native.creation for fd, native in known.items()})
        return OpenSockets(creations, set(), set(creations))

    def _same_if_unchanged(self, creations: dict[int, CreationTuple]) -> dict[int, CreationTuple]:
        """The same object for as long as nothing is new, which saves the poller much work."""
        last = self._handed_out
        if creations.keys() == last.keys() and all(map(is_, creations.values(), last.values())):
            return last
        self._handed_out = creations
        return creations

    def last_open(self) -> Iterable[CreationTuple]:
        """The sockets with an object, which these may be copies of."""
        return self._tracked.last_open()

    def last_serial(self) -> int:
        """The serial of the latest that was found."""
        return self._last_serial

    def _take_census(self) -> None:
        # Before the listing: what is assigned meanwhile is newer than what is found.
        before = self._known.copy()
        self.enter(NativeListing.take(self._tracked), before)

    def enter(self, census: NativeListing, before: dict[int, _Native]) -> None:
        """Add what a census has found, and remove what was known before and is gone."""
        found = census.found
        self.count = None if found is None else len(found)
        if found is None:
            return
        opened_at = wall() if self._has_counted else None
        self._has_counted = True
        for fd, native in before.items():
            if found.get(fd) != native.inode:
                pop_if_same(self._known, fd, native)
        for fd, inode in found.items():
            if fd not in self._known and fd >= _FIRST_FD:
                creation = self._new_creation(opened_at, _UNKNOWN_CALL, census.pid)
                self._known.setdefault(fd, _Native(creation, inode, census.mark, census.at))

    @property
    def attributed(self) -> int:
        """How many of them have been opened by calls that are known."""
        return sum(bool(native.creation[STACK]) for native in self._known.copy().values())

    @property
    def earlier(self) -> int:
        """How many of them the first census found."""
        return sum(Creation(*n.creation).opened_at is None for n in self._known.copy().values())

    def is_new(self, seen: Observation) -> bool:
        """Whether it has not been one for long enough that it cannot be anything else.

        A socket that another thread is in the middle of making, or of closing, has no object
        either: but not for long.
        """
        native = self._known.get(seen.fd)
        return native is not None and now() < native.seen_at + SETTLED_AFTER and self.is_still(seen)

    def is_still(self, seen: Observation) -> bool:
        """Whether what was seen is still open, and still without a socket object."""
        native = self._known.get(seen.fd)
        return (
            native is not None
            and native.creation[SERIAL] == seen.record.serial
            and native.inode == seen.inode == inode_of(seen.fd)
            and not self._tracked.is_tracked(seen.fd, native.since)
        )

    def discard(self, fd: int, creation: CreationTuple) -> None:
        """Remove one that is closed."""
        native = self._known.get(fd)
        if native is not None and native.creation is creation:
            pop_if_same(self._known, fd, native)

    def dropped(self) -> tuple[DroppedSocket, ...]:
        """None: the end of what has no object is not noticed."""
        return ()

    def assign_creation(self, fds: Iterable[int], call: _Call) -> None:
        """Say which call has opened some of them."""
        for fd in fds:
            since, inode, known = self._tracked.mark(), inode_of(fd), self._known.get(fd)
            if inode is None or self._tracked.is_tracked(fd):
                continue
            if known is not None and known.inode == inode and known.creation[STACK]:
                continue
            creation = self._new_creation(wall(), call, os.getpid())
            self._known[fd] = _Native(creation, inode, since, now())

    def current_fds(self) -> set[int]:
        """The descriptors of all sockets that no object is known for, at this moment."""
        return set(sockets_besides(self._tracked.is_tracked) or ())

    def after_fork(self) -> None:
        """In the child: a census of our own comes next."""
        self._paused_until = 0.0

    def _new_creation(self, opened_at: float | None, call: _Call, pid: int) -> CreationTuple:
        serial = self._last_serial = self._tracked.mark()
        return tuple(
            Creation(
                sock=no_socket,
                object_id=0,
                serial=serial,
                pid=pid,
                opened_at=opened_at,
                thread=call.thread,
                task=call.task,
                labels=call.labels,
                context=NO_CONTEXT,
                origin=Origin.NATIVE,
                parent=None,
                stack=call.stack,
            )
        )


class CallAttribution:
    """Wraps the callables that open native sockets, for one guard and until `undo`."""

    def __init__(self, natives: NativeSockets, stack_depth: int) -> None:
        self._natives = natives
        self._depth = stack_depth
        self._undo: dict[str, Callable[[], None]] = {}
        # Objects that may open a descriptor after they were made, by the identity of the reference.
        self._watched: dict[int, tuple[weakref.ref[Any], _Call]] = {}

    def wrap(self, *names: str) -> None:
        """Wrap each `module:callable`, or all that is known of a library. Idempotent."""
        known = _attributed_callables()
        for name in names:
            try:
                attributed_module(name)
            except ConfigurationError as error:
                raise ConfigurationError(f"attribute({name!r}): {error}") from None
            with patch.install_lock():
                for reference in known.get(name, (name,)):
                    if reference not in self._undo:
                        self._undo[reference] = self._wrap(reference)

    def wrap_or_note(self, name: str) -> None:
        """Do the same in the middle of an import of the program; the reports say what failed."""
        try:
            self.wrap(name)
        except ConfigurationError as error:
            self._natives.notes += (f"where {name} opens sockets: {error}",)

    def _wrap(self, reference: str) -> Callable[[], None]:
        module, _, path = reference.partition(":")
        *holders, last = path.split(".")
        try:
            place: Any = import_module(module)
            for holder in holders:
                place = getattr(place, holder)
            return patch.wrap_callable(place, last, self._wrapper)
        except Exception as error:
            raise ConfigurationError(f"attribute({reference!r}): {_why(error)}") from error

    def _wrapper(self, wrapped: Any, owner: object, args: Any, kwargs: Any) -> Any:
        if not self._undo:
            return wrapped(*args, **kwargs)
        assign = self._assigner(owner, current_frame(1))
        result = wrapped(*args, **kwargs)
        # A coroutine, also one of Cython's, which inspect does not take for one.
        if inspect.isawaitable(result) and hasattr(result, "send"):
            return _assign_awaited(result, assign)
        # What a method returns owns the socket, or what it is a method of, as of a constructor.
        assign(owner if result is None else result)
        return result

    def _assigner(self, owner: object, caller: FrameType) -> Callable[[object], None]:
        """What assigns a call, which is about to be made, to what it will have opened."""
        try:
            before = set() if _kind_of(owner) is not None else self._natives.current_fds()
            return partial(self._assign_or_ignore, before, self._call_from(caller))
        except Exception as error:
            if interrupts(error):
                raise
            return lambda _: None

    def _call_from(self, caller: FrameType) -> _Call:
        stack = capture(caller, self._depth)
        # The task may have a line of the program only in those that await it.
        task = note_task(stack, caller, capture, self._depth)
        return _Call(stack, threading.current_thread().name, task, LABELS.get())

    def _assign_or_ignore(self, before: set[int], call: _Call, result: object) -> None:
        with contextlib.suppress(Exception):  # Nothing of ours is raised into the program.
            self._assign(before, call, result)

    def _assign(self, before: set[int], call: _Call, result: object) -> None:
        """Assign the call to the descriptors of the result, or to all that have appeared."""
        owner = result[0] if type(result) is tuple and result else result
        fds = _descriptors(owner)
        if fds is None:
            fds = self._natives.current_fds() - before
        elif not fds:
            self._watch_owner(owner, call)
        self._natives.assign_creation(fds, call)

    def _watch_owner(self, owner: object, call: _Call) -> None:
        for key, (ref, _) in self._watched.copy().items():
            if ref() is None:
                self._watched.pop(key, None)
        ref = weakref.ref(owner)
        # The hash of the reference would be that of the program's object.
        self._watched[id(ref)] = (ref, call)

    def refresh(self) -> None:
        """Assign the calls to the descriptors that watched owners have opened since."""
        for ref, call in self._watched.copy().values():
            owner = ref()
            if owner is not None:
                self._natives.assign_creation(_descriptors(owner) or (), call)

    def undo(self) -> None:
        """Restore the callables; those that others have wrapped since stay, and record nothing."""
        undo, self._undo = self._undo, {}
        self._watched.clear()
        for restore in undo.values():
            restore()


def attributed_libraries() -> Iterable[str]:
    """The libraries that `attribute()` knows."""
    return _attributed_callables()


def attributed_module(name: str) -> str:
    """The module in which a name of `attribute()` wraps something.

    Raises:
        ConfigurationError: It is neither a known library nor a `module:callable`.
    """
    module, colon, path = name.partition(":")
    if module in _attributed_callables() and not colon:
        return module
    if not (path and all(part.isidentifier() for part in (*module.split("."), *path.split(".")))):
        known = ", ".join(sorted(_attributed_callables()))
        near = did_you_mean(name, _attributed_callables())
        raise ConfigurationError(
            f'expected "module:callable" or a library, got {shown(name)}.{near} Libraries: {known}'
        )
    return module


def _why(error: Exception) -> str:
    if isinstance(error, AttributeError):
        # What Python says of a module in the middle of its import would mislead.
        return f"not found (the module has no {error.name!r})"
    is_missing = isinstance(error, ImportError)
    what = "not found" if is_missing else "only a callable written in Python can be wrapped"
    return f"{what} ({type(error).__name__}: {error})"


async def _assign_awaited(result: Any, assign: Callable[[object], None]) -> Any:
    awaited = await result
    assign(awaited)
    return awaited


def _attributed_callables() -> dict[str, tuple[str, ...]]:
    """What to wrap, by the name of a library."""
    libraries = _libraries.LIBRARIES
    return {library.name: library.attributed for library in libraries if library.attributed}


# By the identity of a class: what it was found to be, while so many modules were loaded.
_kinds: dict[int, tuple[weakref.ref[type], HandleKind | None, int]] = {}
_MAX_KINDS = 1000


def _kind_of(owner: object) -> HandleKind | None:
    """What is known of the class of an object, which takes a look at all modules to find out."""
    cls, modules = type(owner), len(sys.modules)
    known = _kinds.get(id(cls))
    if known is not None and known[0]() is cls and (known[1] is not None or known[2] == modules):
        return known[1]
    kinds = (kind for library in _libraries.LIBRARIES for kind in library.handles)
    found = next((kind for kind in kinds if is_any_of(owner, loaded(kind.classes))), None)
    if len(_kinds) >= _MAX_KINDS:
        _kinds.clear()
    _kinds[id(cls)] = weakref.ref(cls), found, modules
    return found


def _descriptors(owner: object) -> set[int] | None:
    """The open descriptors of an object of a known kind; None for any other object."""
    kind = _kind_of(owner)
    if kind is None:
        return None
    try:
        return {fd for fd in kind.descriptors(owner) if fd >= 0}
    except Exception:
        # It is not open yet, or too busy to answer.
        return set()
