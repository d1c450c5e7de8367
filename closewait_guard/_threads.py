"""Threads and processes: whether the guard's may run, calls with a time limit, hooks of forks.

Also what Linux says of the threads of a process: its children, and what is waited for.
"""

from __future__ import annotations

import contextvars
import io
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import CodeType, FrameType, FunctionType
from typing import NamedTuple

from closewait_guard._clock import now
from closewait_guard._cpython import (
    current_frame,
    daemon_threads_allowed,
    interpreter_states,
    keep_library,
)
from closewait_guard._interruptions import DeferredErrors, interrupts

__all__ = [
    "CallThread",
    "ForkPoint",
    "StillBusyError",
    "WaitingCalls",
    "allows_daemons",
    "before_fork",
    "descendants_of",
    "get_ident",
    "in_child",
    "in_parent",
    "waiting_calls_of",
]


allows_daemons: Callable[[], bool]

_interpreters = interpreter_states("own", "main")
if _interpreters is None:
    allows_daemons = daemon_threads_allowed
else:
    _own, _main = _interpreters

    def _is_main() -> bool:
        return bool(_own() == _main())

    allows_daemons = _is_main

if sys.platform == "linux":
    # An interpreter that ends has daemon threads call pthread_exit(), for which glibc loads this
    # library. With no descriptor left it could not, and would abort the program.
    keep_library("libgcc_s.so.1")


class StillBusyError(Exception):
    """The function has not returned in time."""


class CallThread:
    """Calls functions in a thread, one at a time: one that blocks does not block the caller."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._has_blocked = False
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], object], timeout: float) -> BaseException | None:
        """Return what the function raised, or that it has not returned or could not start yet."""
        # Wait once for a function that blocks, and never for one that reports from within itself.
        is_hopeless = self._has_blocked or self._thread is threading.current_thread()
        if not self._lock.acquire(timeout=0 if is_hopeless else timeout):
            return StillBusyError()
        raised: list[BaseException] = []
        is_done = threading.Event()

        def call_it() -> None:
            try:
                function()
            except BaseException as error:
                raised.append(error)
            finally:
                is_done.set()
                lock.release()

        lock = self._lock
        self._run(call_it, timeout)
        self._has_blocked = not is_done.is_set()
        return StillBusyError() if self._has_blocked else next(iter(raised), None)

    def _run(self, call_it: Callable[[], None], timeout: float) -> None:
        # Values that the program has bound with structlog are bound there too.
        context = contextvars.copy_context()
        self._thread = thread = threading.Thread(
            target=context.run,
            args=(call_it,),
            name="closewait-guard-reporter",
            daemon=allows_daemons(),
        )
        if _try_start(thread):
            # From here on the next call may have begun, in another thread.
            thread.join(timeout)
        else:
            self._thread = threading.current_thread()
            call_it()


def _try_start(thread: threading.Thread) -> bool:
    """Start a thread if that is possible: there may be too many, or the interpreter ends."""
    if sys.is_finalizing() or not thread.daemon:
        # It would seem to start but never run, or keep its interpreter from ending.
        return False
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


class ForkPoint(NamedTuple):
    """When this process was forked, by whom, and in which calls of which thread, outermost first.

    Code and offset of each call, never the frame.
    """

    at: float
    parent: int
    thread: int
    calls: tuple[tuple[CodeType, int], ...]

    @classmethod
    def here(cls) -> ForkPoint:
        """In the child, in the thread that has called `fork()`."""
        frame: FrameType | None = current_frame(0)
        while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        calls: list[tuple[CodeType, int]] = []
        while frame is not None:
            calls.append((frame.f_code, frame.f_lasti))
            frame = frame.f_back
        return cls(now(), os.getppid(), threading.get_ident(), tuple(calls[::-1]))


# Not what a test, or gevent, has put in its place by the time that something is loaded late.
get_ident = threading.get_ident

_PACKAGE = __file__.removesuffix("_threads.py")

_Functions = list[weakref.ref[Callable[[], None]]]
_before: _Functions = []
_in_child: _Functions = []
_in_parent: _Functions = []
# In place of this, each hook has one of those.
_functions = _in_child


def before_fork(function: Callable[[], None]) -> Callable[[], None]:
    """Have a function of a module called before every fork; one that takes long, at most once."""

    def call() -> None:
        try:
            function()
        except BaseException as error:
            # Python would only print it. The child is not the one that was interrupted.
            if interrupts(error):
                _interruptions.append(error)

    _before.append(weakref.ref(call))
    return call


def in_child(function: Callable[[], None]) -> Callable[[], None]:
    """Have a function of a module called in every forked child, in the order of registration."""
    _in_child.append(weakref.ref(function))
    return function


def in_parent(function: Callable[[], None]) -> Callable[[], None]:
    """Have a function of a module called after every fork in the process that has forked."""
    _in_parent.append(weakref.ref(function))
    return function


def _call_all() -> None:
    for reference in _functions:
        function = reference()
        if function is not None:
            function()


# What the program's signal handlers have raised before a fork.
_interruptions: list[BaseException] = []


@in_child
def _drop_interruptions() -> None:
    _interruptions.clear()


def _raise_interruptions() -> None:
    while _interruptions:
        _deferred.raise_later(_interruptions.pop())


_deferred = DeferredErrors((_raise_interruptions.__code__, _call_all.__code__))

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=FunctionType(_call_all.__code__, {"_functions": _before}),
        after_in_child=FunctionType(_call_all.__code__, {"_functions": _in_child}),
        after_in_parent=FunctionType(_call_all.__code__, {"_functions": _in_parent}),
    )
    # Last: until all of them have been called, it would have to wait.
    _raise = [weakref.ref(_raise_interruptions)]
    os.register_at_fork(after_in_parent=FunctionType(_call_all.__code__, {"_functions": _raise}))


def _text_of(path: str) -> str:
    # Not the `open` of builtins, which a test may have replaced, nor a codec that is loaded late.
    with io.open(path, "rb") as file:  # noqa: UP020
        return file.read().decode("ascii")


def descendants_of(pid: int, at_most: int) -> list[int]:
    """The running children of a process, and theirs; where there are more, some. Linux only.

    Raises:
        OSError: They cannot be read, as without a descriptor.
    """
    pids = [pid]
    for parent in pids:
        if len(pids) > at_most:
            break
        folder, tasks = f"/proc/{parent}/task", list[str]()
        # It may have ended meanwhile, or a thread of it.
        with suppress(FileNotFoundError, ProcessLookupError):
            tasks = os.listdir(folder)  # noqa: PTH208
        for task in tasks:
            with suppress(FileNotFoundError, ProcessLookupError):
                pids += map(int, _text_of(f"{folder}/{task}/children").split())
    return pids[1:]


class WaitingCalls(NamedTuple):
    """The system calls that the threads of a process wait in.

    Attributes:
        fds: Their first arguments, which are descriptors for most calls, and what each epoll
            that is waited for watches.
        may_use_others: A thread runs, or waits in a call that does not show for what.
    """

    fds: set[int]
    may_use_others: bool


def waiting_calls_of(pid: int | str) -> WaitingCalls:
    """What the threads of a process wait for in the kernel. Linux only.

    Raises:
        OSError: The process has ended, or may not be looked into.
    """
    found, hidden = set[int](), _CALLS_WITH_HIDDEN_FDS.get(os.uname().machine)
    may_use_others = hidden is None
    for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - names only
        try:
            words = _text_of(f"/proc/{pid}/task/{task}/syscall").split()
        except (FileNotFoundError, ProcessLookupError):
            # The thread has ended.
            continue
        if len(words) < 3 or int(words[0]) < 0:
            may_use_others = True
            continue
        may_use_others = may_use_others or int(words[0]) in (hidden or ())
        fd = int(words[1], 16)
        found |= {fd, *_watched_by(pid, fd)}
    return WaitingCalls(found, may_use_others)


def _watched_by(pid: int | str, fd: int) -> Iterator[int]:
    with suppress(OSError):
        for line in _text_of(f"/proc/{pid}/fdinfo/{fd}").splitlines():
            if line.startswith("tfd:"):
                yield int(line.split()[1])


# poll, select, pselect6 and ppoll have descriptors in memory, io_uring_enter in a ring.
_CALLS_WITH_HIDDEN_FDS = {
    "x86_64": frozenset({7, 23, 270, 271, 426}),
    "aarch64": frozenset({72, 73, 426}),
}
