"""Which calls wait for the task in which a socket is created.

Libraries open sockets in tasks of their own: on the stack of such a task is no line of the program,
and what called the event loop has nothing to do with it. So the stack goes on in the task that
awaits this one, to the calls that are suspended there, until one of them is the program's.

A task of asyncio knows what to call when it is done. From there a few objects lead to the task that
waits. One of trio runs in the nursery of another.
Only code objects and offsets are kept, of no task and no coroutine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from operator import attrgetter, methodcaller
from types import BuiltinMethodType, FrameType, FunctionType, MethodType
from typing import Any, NamedTuple

from closewait_guard._capture.stack import PROGRAM, Capture, CapturedStack, capture, owner_of
from closewait_guard._cpython import (
    AWAITED_BY,
    DONE_CALLBACKS,
    GROUP_TASK,
    QUEUE_OF_DONE,
    QUEUE_WAITERS,
    RACING_TASKS,
)
from closewait_guard._live import field, is_a, suspended_frames, type_qualname, variable_of

__all__ = [
    "continue_in_greenlets",
    "continue_stack",
]


_HOST_TASK = "_host_task"  # Of a cancel scope of anyio.
_MOST_TASKS = 8
_MOST_OBJECTS = 30
_PLAIN = frozenset({type(None), bool, int, float, str, list, tuple, dict, set})


def continue_stack(
    stack: CapturedStack, calls: int, caller: FrameType, capture: Capture, depth: int
) -> None:
    """Go on in the tasks that wait for this one, up to the first that has a line of the program.

    Args:
        stack: What was captured, event loop and all.
        calls: How many of these are the current task's.
        caller: From where on it was captured.
        capture: Takes the calls of what runs the event loop.
        depth: How many calls to take of each task.
    """
    library = _TRIO if stack[calls * 2].co_name == "unrolled_run" else _ASYNCIO
    del stack[calls * 2 :]
    if (task := library.current()) is None:
        return
    for _ in range(_MOST_TASKS):
        task = library.awaiting(task)
        if task is _EVENT_LOOP:
            _add_callers(stack, calls, caller, capture, depth)
        if task is None or task is _EVENT_LOOP:
            return
        if _add_suspended(stack, library.coroutine(task), depth):
            return


def continue_in_greenlets(stack: CapturedStack, depth: int) -> None:
    """Go on in the greenlets that wait for this one, to a line of the program.

    The calls of a greenlet end where it was started: SQLAlchemy runs its synchronous part in one.
    """
    if len(stack) == 1:  # It shares its calls already.
        stack[:] = [
            each for call in zip(stack[0].codes, stack[0].offsets, strict=True) for each in call
        ]
    greenlet = sys.modules["greenlet"].getcurrent().parent
    while (
        greenlet is not None
        and 0 < len(stack) < depth * 2
        and not any(owner_of(code.co_filename) is PROGRAM for code in stack[::2])
    ):
        if greenlet.gr_frame is not None:
            stack += capture(greenlet.gr_frame, depth - len(stack) // 2)
        greenlet = greenlet.parent


def _add_callers(
    stack: CapturedStack, calls: int, frame: FrameType | None, capture: Capture, depth: int
) -> None:
    """Add what runs the event loop, where it was started for the task."""
    for _ in range(calls):
        frame = None if frame is None else frame.f_back
    if frame is not None:
        outer = capture(frame, depth)
        outer[1::2] = map(_mark, outer[1::2])
        stack += outer


def _mark(offset: int) -> int:
    """An offset as that of a call which waits, where `~` gives the offset again."""
    return ~max(offset, 0)


def _add_suspended(stack: CapturedStack, coroutine: Any, depth: int) -> bool:
    """Whether one of the calls is of the program."""
    found = False
    for frame in suspended_frames(coroutine)[:depth]:
        stack += (frame.f_code, _mark(frame.f_lasti))
        found = found or owner_of(frame.f_code.co_filename) is PROGRAM
    return found


# In place of a task: what runs the event loop until this one is done.
_EVENT_LOOP = object()


def _parent_of_trio(task: Any) -> Any:
    """The task whose nursery another runs in; `_EVENT_LOOP` for that of `trio.run()`."""
    parent = None if task.parent_nursery is None else task.parent_nursery.parent_task
    is_root = parent is not None and parent.parent_nursery is None
    return _EVENT_LOOP if is_root else parent


def _awaiting_task(task: Any) -> Any:
    """The task that waits for another; `_EVENT_LOOP`, or None where there is none."""
    kind: type = sys.modules["asyncio"].Task
    found = [*_waiting_for(task), *_waiting_for_race(task)]
    for number, thing in enumerate(found):
        if number >= _MOST_OBJECTS or thing is _EVENT_LOOP:
            return thing if thing is _EVENT_LOOP else None
        if not is_a(thing, kind):
            found += _next_to(thing, kind)
        elif thing is not task and not thing.done():
            return thing
    return None


def _next_to(thing: Any, task: type) -> Iterable[Any]:
    """What leads from a callback, or an object that it has, to what waits for its call."""
    if type(thing) is FunctionType:
        if _ends_loop(thing):
            return (_EVENT_LOOP,)
        return _apart_from_tasks(_cells(thing), task)
    if type(thing) is partial:
        return _apart_from_tasks(thing.args, task)
    if type(thing) in (MethodType, BuiltinMethodType):
        # Of a task only what resumes it: another method may be anything, as `cancel`.
        resumes = "wakeup" in thing.__name__
        return (thing.__self__,) if resumes or not is_a(thing.__self__, task) else ()
    if type_qualname(type(thing)) == "cython_function_or_method":
        return (_EVENT_LOOP,) if _ends_loop(thing) else ()
    asyncio = sys.modules["asyncio"]
    if is_a(thing, asyncio.Future):
        return _waiting_for(thing)
    # Most of what a callback has leads nowhere, and looking for attributes takes long.
    if type(thing) in _PLAIN or is_a(thing, asyncio.AbstractEventLoop):
        return ()
    return _linked(thing)


def _ends_loop(callback: Any) -> bool:
    """Whether a callback is asyncio's or uvloop's, and ends what was started for one task."""
    return "run_until_complete" in callback.__qualname__


def _waiting_for(future: Any) -> Iterator[Any]:
    """What the interpreter knows to wait for a future or task, and what is to be called."""
    yield from getattr(future, AWAITED_BY, None) or ()
    for callback, _ in getattr(future, DONE_CALLBACKS, None) or ():
        yield callback


def _waiting_for_race(task: Any) -> Iterable[Any]:
    """What is to be called for other tasks of happy eyeballs: of a new one, nothing yet."""
    frame = getattr(task.get_coro(), "cr_frame", None)
    if frame is None or RACING_TASKS not in frame.f_code.co_freevars:
        return ()
    return chain.from_iterable(map(_waiting_for, variable_of(frame, RACING_TASKS) or ()))


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            continue


def _apart_from_tasks(things: Iterable[Any], task: type) -> list[Any]:
    """A function that is called at the end of one task may know others for any reason."""
    return [thing for thing in things if not is_a(thing, task)]


def _linked(thing: object) -> Iterator[Any]:
    """What groups of tasks and queues have of those that wait."""
    for linked in (
        field(thing, GROUP_TASK),
        field(field(thing, "cancel_scope"), _HOST_TASK),
        field(thing, QUEUE_OF_DONE),
        *(field(thing, QUEUE_WAITERS) or ()),
    ):
        if linked is not None:
            yield linked


class _Library(NamedTuple):
    """How a library's tasks are asked."""

    current: Callable[[], Any]
    awaiting: Callable[[Any], Any]
    coroutine: Callable[[Any], Any]


def _current_of_asyncio() -> Any:
    return sys.modules["asyncio"].current_task()


def _current_of_trio() -> Any:
    return sys.modules["trio"].lowlevel.current_task()


_ASYNCIO = _Library(_current_of_asyncio, _awaiting_task, methodcaller("get_coro"))
_TRIO = _Library(_current_of_trio, _parent_of_trio, attrgetter("coro"))
