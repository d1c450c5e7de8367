"""The frames of all threads, and their local variables, read without the program noticing.

`sys._current_frames()` goes through all interpreters of the process. From Python 3.12 on another
may run at that moment, and the process aborts; before, its frames are not of this program. So it is
called only where there is one interpreter.

It allocates with a lock held that each new thread takes. Before Python 3.12 a collection may begin
there, and if it runs code of the program, which waits for another thread, and that waits for the
lock, all wait forever. So the collector is off meanwhile.

Without the GIL other threads go on meanwhile, and their calls end: of those nothing is read there.

Until Python 3.12 `f_locals` writes the values into a dict that `exec`, `locals()` and debuggers
share, over whatever they have put there, and that dict keeps each value alive for as long as the
function runs. There the pointers of the frame are copied instead; from 3.13 on `f_locals` of a
function's frame is a view. Before 3.13.5 the view of a call that another thread ends at that moment
crashes the interpreter: of other threads the pointers are copied there too.

What a call has on its stack only is copied on every Python: nothing else shows it.
"""

from __future__ import annotations

import gc
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import compress
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any, TypeAlias

from closewait_guard._cpython import (
    TASK_STATE,
    current_frame,
    current_frames,
    has_gil,
    interpreter_states,
)
from closewait_guard._interruptions import refusals
from closewait_guard._live.gc_objects import instances_of, kinds_of, without_collection
from closewait_guard._live.objects import (
    call_native,
    field,
    find_classes,
    is_exactly,
    module_name,
    native_field,
    text_of,
    type_qualname,
)

__all__ = [
    "hidden_by_interpreter",
    "is_finished",
    "load_frame_copy",
    "locals_of",
    "locals_of_other_thread",
    "running_frames",
    "sees_all_threads",
    "shows_other_threads",
    "suspended_frames",
    "suspension_of",
    "unfinished_tasks",
    "unnamed_values_of",
    "variable_of",
]


def running_frames() -> dict[int, FrameType]:
    """By thread: where it is. Only this thread where the process has several interpreters."""
    # A variable that holds the frame it is in would keep all that it has found, until garbage is
    # collected: the caller is not given its own, but that of its caller.
    frames, own = _frames_if_alone(), current_frame(1).f_back
    frames.pop(threading.get_ident(), None)
    return frames if own is None else frames | {threading.get_ident(): own}


def sees_all_threads() -> bool:
    """Whether `running_frames` shows other threads than this one."""
    return bool(_frames_if_alone())


def _nothing() -> dict[int, FrameType]:
    return {}


_Frames: TypeAlias = dict[int, FrameType]
_frames_if_alone: Callable[[], _Frames]

# Not `_interpreters.list_all()`: it reads what another thread may be about to free.
_interpreters = interpreter_states("newest", "main")
if _interpreters is None:
    _frames_if_alone = _nothing
else:
    _newest, _main = _interpreters

    def _if_alone() -> dict[int, FrameType]:
        """All frames, if the newest interpreter is the main one.

        Question and answer are one call into C: no thread can make an interpreter in between.
        """
        if not has_gil():
            return {}
        is_alone = map(operator.eq, map(operator.call, (_newest,)), map(operator.call, (_main,)))
        try:
            return next(
                without_collection(map(operator.call, compress((current_frames,), is_alone))), {}
            )
        except Exception as error:
            refusals.note(error)
            return {}

    _frames_if_alone = _if_alone


# As in `inspect`, which takes long to import.
_CO_OPTIMIZED = 1
# Of a generator, a coroutine and an asynchronous generator.
_CO_SUSPENDABLE = 0x20 | 0x80 | 0x200
_HAS_VIEW = sys.version_info >= (3, 13)
_OTHERS_CRASH = (3, 13) <= sys.version_info < (3, 13, 5)

_Pairs: TypeAlias = list[tuple[str, Any]]


def locals_of(frame: FrameType) -> dict[str, Any]:
    """The variables of a function's frame; none of a module's, which has them in its globals."""
    return dict(_read(frame)) if frame.f_code.co_flags & _CO_OPTIMIZED else {}


def locals_of_other_thread(frame: FrameType) -> dict[str, Any]:
    """The same of a call that may end at any moment; none where they cannot be read safely.

    The view of a generator that is gone shows what has its memory now.
    """
    flags = frame.f_code.co_flags
    if not has_gil() or not flags & _CO_OPTIMIZED:
        return {}
    if _read_of_others is _by_view and flags & _CO_SUSPENDABLE:
        return {}
    return dict(_read_of_others(frame))


def shows_other_threads() -> bool:
    """Whether the variables of calls in other threads can be read at all."""
    return has_gil() and (_read_of_others is _by_view or _frame_copy() is not None)


def hidden_by_interpreter() -> Iterator[str]:
    """What cannot be read of this process's objects and threads, as notes of a report."""
    if not has_gil():
        yield (
            "what holds sockets, which pools and other threads use them, and the objects of those "
            "older than the guard: without the GIL that cannot be read safely"
        )
    elif not sees_all_threads():
        yield (
            "what other threads do, have in their variables or read of closed sockets, because "
            "this process has several interpreters"
        )
    elif not shows_other_threads():
        yield "what other threads have in their variables: this Python does not show it safely"


def unnamed_values_of(frame: FrameType) -> list[object]:
    """What a running call has no variable for: what a `with` without `as` is to exit, for one.

    Not all of it, and none where it cannot be read safely.
    """
    if not frame.f_code.co_exceptiontable or not has_gil() or (copy := _frame_copy()) is None:
        return []
    stack: list[object] = copy.copied_stack(frame)
    return stack


def variable_of(frame: FrameType, name: str) -> Any:
    """The value of one variable of a function's frame; None where it has none."""
    return locals_of(frame).get(name)


def suspended_frames(awaited: Any) -> list[FrameType]:
    """Where a coroutine or generator, and each that it awaits, is suspended; innermost first."""
    frames: list[FrameType] = []
    for _ in range(100):
        frame, awaited = suspension_of(awaited)
        if frame is None:
            break
        frames.append(frame)
    return frames[::-1]


def suspension_of(awaited: Any) -> tuple[FrameType | None, Any]:
    """The frame of a coroutine or generator, and what it awaits."""
    kind = type(awaited)
    if kind is CoroutineType:
        return awaited.cr_frame, awaited.cr_await
    if kind is GeneratorType:
        return awaited.gi_frame, awaited.gi_yieldfrom
    if kind is AsyncGeneratorType:
        return awaited.ag_frame, awaited.ag_await
    if module_name(kind) == "builtins" and type_qualname(kind) in _AWAITERS:
        for inner in gc.get_referents(awaited):
            if is_exactly(inner, _SUSPENDABLE) or type_qualname(type(inner)) in _AWAITERS:
                return suspension_of(inner)
    return None, None


_TASKS = ("_asyncio:Task", "asyncio.tasks:_PyTask", "trio._core._run:Task", "greenlet:greenlet")
_DONE = ("CANCELLED", "FINISHED")


def unfinished_tasks() -> int:
    """How many tasks and greenlets there are in the heap that have something left to run."""
    kinds = [(cls, kind) for cls in find_classes(_TASKS).values() for kind in kinds_of(cls)]
    classes = {id(kind): cls for cls, kind in kinds}
    found = instances_of([kind for _, kind in kinds])
    return sum(not is_finished(task, classes.get(id(type(task)), type(task))) for task in found)


def is_finished(task: Any, cls: type) -> bool:
    """Whether a task of asyncio or trio, or a greenlet, has nothing left to run.

    Args:
        task: The task or greenlet.
        cls: The class of asyncio, trio or greenlet that it has, or that its own derives from.
    """
    if call_native(task, cls, "done") or native_field(task, cls, "dead"):
        return True
    coroutine = native_field(task, cls, "coro")
    has_returned = type(coroutine) is CoroutineType and coroutine.cr_frame is None
    return has_returned or text_of(field(task, TASK_STATE)) in _DONE


# What stands in C between an `await` and what runs for it.
_AWAITERS = frozenset(
    {"coroutine_wrapper", "async_generator_asend", "async_generator_athrow", "anext_awaitable"}
)
_SUSPENDABLE = (CoroutineType, GeneratorType, AsyncGeneratorType)


def _by_view(frame: FrameType) -> _Pairs:
    # A debugger may have added keys of any type.
    return [(name, value) for name, value in frame.f_locals.items() if type(name) is str]


def _by_copy(frame: FrameType) -> _Pairs:
    copy = _frame_copy()
    pairs: _Pairs = [] if copy is None else copy.copied_locals(frame)
    return pairs


def load_frame_copy() -> None:
    """Load what copies the pointers of frames: later there may be no descriptor for an import."""
    if not _loaded:
        _loaded.append(_import_frame_copy())


# None where it cannot be loaded.
_loaded: list[Any] = []


def _frame_copy() -> Any:
    return _loaded[0] if _loaded else _import_frame_copy()


def _import_frame_copy() -> Any:
    """None in isolated interpreters, and where an audit hook refuses ctypes.

    A build of Python may lay frames out in another way, too.
    """
    try:
        from closewait_guard._live import frame_copy
    except Exception:
        return None
    return frame_copy


_read = _by_view if _HAS_VIEW else _by_copy
_read_of_others = _by_copy if _OTHERS_CRASH else _read
