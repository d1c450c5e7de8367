"""Private names of CPython and of its standard library, each once, with what stands in without it.

No other module reads one, except for two on the hottest path (`_capture/recorder.py`), where a call
would cost more than the name: `Thread._name`, without which `threads` is empty, and the function of
`_asyncio` that gives the running loop, without which creations fail, and reports say how many did.
`_socket` is not among them: `socket` itself cannot be without it.
"""

from __future__ import annotations

import _socket
import _thread
import functools
import gc
import io
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import repeat
from types import FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from closewait_guard._cpython import _calls
else:
    try:
        from closewait_guard._cpython import _calls
    except ImportError:
        _calls = None

try:
    # As `random` does: hashlib loads OpenSSL, and would need a descriptor when a report is made.
    from _sha1 import sha1  # type: ignore[import-not-found]
except ImportError:
    from hashlib import sha1

try:
    # As above: hmac loads hashlib.
    from _operator import _compare_digest as compare_digest
except ImportError:
    from hmac import compare_digest  # type: ignore[no-redef]

try:
    # In C: that of `signal` makes an enum of what it finds.
    from _signal import NSIG, getsignal  # type: ignore[import-not-found]
except ImportError:
    from signal import NSIG, getsignal

__all__ = [
    "AWAITED_BY",
    "CONNECTION_HANDLE",
    "DONE_CALLBACKS",
    "EXECUTOR_CLOSED",
    "EXECUTOR_QUEUES",
    "EXECUTOR_THREAD",
    "EXECUTOR_THREADS",
    "FILE_SOCKET",
    "FINALIZER_ENTRIES",
    "GROUP_TASK",
    "HANDLE_CALLBACK",
    "INNER_SOCKET",
    "IS_SHUTTING_DOWN",
    "JOIN_AT_EXIT",
    "LOOP_CLOSED",
    "LOOP_OF",
    "LOOP_SELECTOR",
    "LOOP_THREAD",
    "LOOP_TRANSPORTS",
    "LOOP_WAKERS",
    "NSIG",
    "POOL_QUEUES",
    "POOL_STATE",
    "POOL_TASKS",
    "POOL_THREADS",
    "QUEUE_ENDS",
    "QUEUE_OF_DONE",
    "QUEUE_THREAD",
    "QUEUE_WAITERS",
    "RACING_TASKS",
    "REFERENCE_CALLBACK",
    "SELECTOR_KEYS",
    "TASK_COROUTINE",
    "TASK_NAME",
    "TASK_STATE",
    "THREAD_NAME",
    "THREAD_TARGET",
    "TRANSPORT_CLOSED",
    "TRANSPORT_PROCESS",
    "before_exit_functions",
    "close_in_collections_by",
    "compare_digest",
    "current_frame",
    "current_frames",
    "daemon_threads_allowed",
    "dropping_errors",
    "file_objects_reader",
    "finalizers_at_exit",
    "getsignal",
    "has_gil",
    "interpreter_states",
    "is_closed_reader",
    "keep_library",
    "keep_open_in_tokenize",
    "main_thread_waker",
    "native_handler",
    "refuse_changes",
    "running_loop",
    "sha1",
    "store_by_slot",
    "threads",
    "truth_asker",
    "weak_reference",
]


_Class = TypeVar("_Class")

# Attributes of objects, read by `field()`, which answers None where there is no such.
THREAD_NAME = "_name"  # Else the thread is shown by its number.
# Of threading, and of concurrent.futures.thread. Else what threads keep at exit was dropped.
IS_SHUTTING_DOWN, JOIN_AT_EXIT, EXECUTOR_THREADS = "_SHUTTING_DOWN", "_shutdown", "_threads_queues"
THREAD_TARGET = "_target"  # Else a worker of an executor belongs to the test that has started it.
# Of a task in Python only; one in C is asked by its methods.
TASK_NAME, TASK_COROUTINE = "_name", "_coro"  # Else a task is shown without them.
TASK_STATE = "_state"  # Else it counts as unfinished.
HANDLE_CALLBACK = "_callback"  # Else the event loop is named without what it is to call.
LOOP_CLOSED = "_closed"  # Else each loop counts as open, and as one that may use a pool.
LOOP_WAKERS = "_ssock", "_csock"  # Else a loop is not missed, or its sockets are its test's.
LOOP_THREAD = "_thread_id"  # Else each loop counts as one that does not run.
LOOP_OF = "_loop"  # Of a transport or lock. Else no pool belongs to a loop.
LOOP_CALLS = ("_ready", "_scheduled")  # Else what a loop has yet to close is its test's leak.
LOOP_SELECTOR = "_selector"  # And of that the epoll. Else a loop knows no sockets but its own.
SELECTOR_KEYS = "_fd_to_key"  # Else a loop that is blocked is not seen.
LOOP_TRANSPORTS = "_transports"  # Else what a closed loop leaves open is not reported.
TRANSPORT_CLOSED, TRANSPORT_PROCESS = "_closed", "_proc"  # Else a subprocess is not missed.
INNER_SOCKET = "_sock"  # In C, of a library's own class; else the object counts as no socket.
FILE_SOCKET = "_sock"  # Of the file of `makefile()`; else it counts as not being read.
# Else a socket that a library opens in a task of its own has no line of the program.
DONE_CALLBACKS = "_callbacks"  # Of a future or task.
AWAITED_BY = "_asyncio_awaited_by"  # Of a future or task, since Python 3.14.
GROUP_TASK = "_parent_task"  # Of asyncio.TaskGroup.
RACING_TASKS = "running_tasks"  # A variable of `staggered_race`, until Python 3.13.
QUEUE_OF_DONE, QUEUE_WAITERS = "_done", "_getters"  # Of `as_completed`, and of that queue.
CONNECTION_HANDLE = "_handle"  # Of multiprocessing; else its descriptor has no known owner.
# Of its pools, and of the executor. Else such a pool is not missed, or counts as one at work.
POOL_STATE, EXECUTOR_CLOSED = "_state", "_shutdown_thread"
POOL_TASKS = "_cache", "_pending_work_items"
POOL_QUEUES = "_inqueue", "_outqueue", "_change_notifier"
EXECUTOR_QUEUES = "_call_queue", "_result_queue", "_executor_manager_thread_wakeup"
QUEUE_ENDS = "_reader", "_writer"
# Else its threads count as some that may need pools.
POOL_THREADS = "_worker_handler", "_task_handler", "_result_handler"
EXECUTOR_THREAD, QUEUE_THREAD = "_executor_manager_thread", "_thread"

# The classes of what `weakref.finalize` keeps until an object ends; else that counts as its use.
FINALIZER_ENTRIES: tuple[type, ...] = tuple(
    entry for entry in (vars(weakref.finalize).get("_Info"),) if isinstance(entry, type)
)


def _frame_by_traceback(depth: int = 0) -> FrameType:
    try:
        next(iter(()))
    except StopIteration as error:
        frame = error.__traceback__.tb_frame.f_back  # type: ignore[union-attr]
    while frame is not None and depth > 0:
        frame, depth = frame.f_back, depth - 1
    if frame is None:
        raise ValueError("call stack is not deep enough")
    return frame


current_frame: Callable[[int], FrameType] = getattr(sys, "_getframe", _frame_by_traceback)


# What tells garbage from what is dropped in time: the collector clears the weak references to
# garbage before it calls finalizers. From Python 3.15 on only those that have a callback, so they
# have one in C that does nothing.
REFERENCE_CALLBACK: Callable[[Any], int] | None = id if sys.version_info >= (3, 15) else None
weak_reference: Callable[[Any], weakref.ref[Any]]
if sys.version_info >= (3, 15):
    weak_reference = partial(weakref.ref, functools.Placeholder, REFERENCE_CALLBACK)
else:
    weak_reference = weakref.ref


# Some builds of Python 3.13 and later can run without the lock that all threads share.
has_gil: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)


def _no_frames() -> dict[int, FrameType]:
    return {}


# None of another thread is seen, which `sees_all_threads()` says.
current_frames: Callable[[], dict[int, FrameType]] = getattr(sys, "_current_frames", _no_frames)


def _known_threads() -> dict[int, Any]:
    has_names = hasattr(threading.main_thread(), THREAD_NAME)
    known: dict[int, Any] = getattr(threading, "_active", {}) if has_names else {}
    return known


# By number, each with a name; nothing where they cannot be read, and all are shown by number.
# Not threading.current_thread(), which registers a dummy for every foreign thread that asks.
threads = _known_threads()


# Since Python 3.12.
daemon_threads_allowed: Callable[[], bool]
daemon_threads_allowed = getattr(_thread, "daemon_threads_allowed", lambda: True)


_open = open


@contextmanager
def keep_open_in_tokenize() -> Iterator[None]:
    """Import meanwhile, even if a test has replaced `open`.

    `tokenize` keeps the one that it finds. With that no source would be read any more.
    """
    was_loaded = "tokenize" in sys.modules
    try:
        yield
    finally:
        tokenize = vars(sys.modules["tokenize"]) if "tokenize" in sys.modules else {}
        if not was_loaded and "_builtin_open" in tokenize:
            tokenize["_builtin_open"] = _open


def before_exit_functions(function: Callable[[], None]) -> None:
    """Call it when the main thread has ended, before functions of `atexit`; never without that."""
    register: Callable[[Callable[[], None]], None] | None
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(function)


def finalizers_at_exit() -> object:
    """What `weakref.finalize` registers with `atexit`; None where no finalizers are seen."""
    return getattr(weakref.finalize, "_exitfunc", None)


def is_closed_reader(socket_class: type, fileno: Callable[[Any], int]) -> Callable[[Any], bool]:
    """Whether `close()` was called; else, whether the descriptor is gone."""
    slot = vars(socket_class).get("_closed")
    return (lambda sock: fileno(sock) < 0) if slot is None else slot.__get__


def file_objects_reader(socket_class: type) -> Callable[[Any], int]:
    """How many file objects keep the descriptor; else, that one may."""
    slot = vars(socket_class).get("_io_refs")
    return (lambda _: 1) if slot is None else slot.__get__


def close_in_collections_by(
    close: Callable[[Any], Any], socket_class: type
) -> Callable[[], None] | None:
    """Have sockets closed by another function while the garbage collector runs.

    `close()` ends in a method that has the class in C as a default argument, and asks that for what
    closes. A module in its place is asked as quickly. The switch is in C throughout: what a signal
    handler raised in a callback of the collector would be lost.

    Returns:
        What undoes it; None where a close cannot be seen.
    """
    method = vars(socket_class).get("_real_close")
    if type(method) is not FunctionType or method.__defaults__ != (_socket.socket,):
        return None
    found, asked = method.__defaults__, ModuleType(__name__)

    def use(function: Callable[[Any], Any]) -> property:
        return property(partial(next, map(partial(setattr, asked, "close"), repeat(function))))

    plain = _socket.socket.close
    phases = type("Phases", (), {"start": use(close), "stop": use(plain)})()
    callback = partial(getattr, phases)
    setattr(asked, "close", plain)  # noqa: B010 - a module declares no attribute
    ours = method.__defaults__ = (asked,)
    gc.callbacks.append(callback)

    def restore() -> None:
        if callback in gc.callbacks:
            gc.callbacks.remove(callback)
        setattr(asked, "close", plain)  # noqa: B010
        if method.__defaults__ is ours:
            method.__defaults__ = found

    return restore


def dropping_errors(function: Callable[[Any], Any]) -> Callable[[Any], None]:
    """The same; what is raised in there is dropped in C, else in Python."""

    class Source(io.RawIOBase):
        _dealloc_warn = staticmethod(function)

        def readable(self) -> bool:
            return True

    def call(argument: Any) -> None:
        try:
            function(argument)
        except BaseException:
            return

    return getattr(io.BufferedReader(Source(), 1), "_dealloc_warn", call)


def running_loop() -> Any:
    """The event loop of this thread; None where none runs."""
    asyncio: Any = sys.modules.get("asyncio")
    # The public function raises where none runs, which takes ten times as long.
    if (ask := getattr(asyncio, "_get_running_loop", None)) is not None:
        return ask()
    try:
        return None if asyncio is None else asyncio.get_running_loop()
    except (AttributeError, RuntimeError):  # The first while it is being imported.
        return None


# Functions of the interpreter in C, by ctypes where they are not compiled in, or are needed late.
# Isolated interpreters have no ctypes, and an audit hook may refuse it.


def interpreter_states(*names: str) -> tuple[Callable[[], int | None], ...] | None:
    """Functions that give the address of an interpreter: `own`, `main` or `newest`.

    None where they cannot be called. No thread can run between two that C calls in a row.
    """
    if _calls is not None:
        return tuple(getattr(_calls, name) for name in names)
    try:
        import ctypes

        address = ctypes.PYFUNCTYPE(ctypes.c_void_p)
        return tuple(address((_IN_C[name], ctypes.pythonapi)) for name in names)
    except Exception:
        return None


_IN_C = {
    "own": "PyInterpreterState_Get",
    "main": "PyInterpreterState_Main",
    "newest": "PyInterpreterState_Head",
}


def native_handler(signum: int) -> int | None:
    """The address of what handles a signal in C, 0 if nothing does; None where that is not known.

    That may not be what `signal.getsignal()` has set: C code sets handlers by itself.
    """
    try:
        import ctypes

        address = ctypes.PYFUNCTYPE(ctypes.c_size_t, ctypes.c_int)
        return int(address(("PyOS_getsig", ctypes.pythonapi))(signum))
    except Exception:
        return None


def truth_asker() -> Callable[[object], bool]:
    """Has the interpreter ask for the truth of an object between two bytecodes of the main thread.

    The function that is returned says whether that will happen.
    """
    if _calls is not None:
        return _calls.ask_soon
    try:
        import ctypes

        add = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.py_object)(
            ("Py_AddPendingCall", ctypes.pythonapi)
        )
        is_true = ctypes.cast(ctypes.pythonapi.PyObject_IsTrue, ctypes.c_void_p)
    except Exception:
        return lambda _: False
    return lambda asked: bool(add(is_true, asked) == 0)


def main_thread_waker(make_calls: Callable[[object], int]) -> Callable[[], object] | None:
    """A function that has the main thread call another, without a signal; None without one."""
    try:
        import ctypes

        add = ctypes.pythonapi.Py_AddPendingCall
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(make_calls)
    except Exception:
        return None
    return lambda: add(callback, None)


def keep_library(name: str) -> None:
    """Load a library of the system for good, if it is there."""
    if _calls is not None:
        _calls.keep_library(name)
        return
    # An isolated interpreter has no ctypes.
    with suppress(Exception):
        import ctypes

        ctypes.CDLL(name)


# Frozen dataclasses with slots. `dataclasses` is not loaded where sockets are only recorded.


def refuse_changes(cls: type[_Class]) -> type[_Class]:
    """Let every attribute of a frozen dataclass be refused as its fields are.

    Of a name that is no field CPython's own asks `super()` of the class that there was before it
    got its slots: a TypeError, which says nothing of what was wrong.
    """
    from dataclasses import FrozenInstanceError

    def refuse(self: object, name: str, *_: object) -> None:
        kind = type(self).__name__
        raise FrozenInstanceError(f"cannot change {name!r} of a {kind}: use dataclasses.replace()")

    cls.__setattr__ = cls.__delattr__ = refuse  # type: ignore[method-assign]
    return cls


def store_by_slot(cls: type[_Class]) -> type[_Class]:
    """Let `__init__` of a frozen dataclass store each value by its slot, in half the time.

    Left to itself it calls `object.__setattr__`, which looks up the slot. A scan makes three of
    these objects for each suspect.
    """
    from dataclasses import MISSING, fields

    parameters, stores = ["self"], []
    names: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        names[f"_store_{field.name}"] = getattr(cls, field.name).__set__
        names[f"_default_{field.name}"] = field.default
        is_required = field.default is MISSING
        parameters.append(field.name if is_required else f"{field.name}=_default_{field.name}")
        stores.append(f" _store_{field.name}(self, {field.name})")
    exec("\n".join([f"def __init__({', '.join(parameters)}):", *stores]), names)  # noqa: S102
    init = functools.update_wrapper(names["__init__"], cls.__init__)
    cls.__init__ = init  # type: ignore[method-assign]
    return cls
