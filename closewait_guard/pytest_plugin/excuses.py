"""Sockets that are open for a reason that is no fault of the test's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from types import FrameType
from typing import Any

from closewait_guard._objects import is_a, items_of, native_field, text_of, value_at
from closewait_guard._socket_values import Frame, SocketRecord
from closewait_guard._variables import locals_of

__all__ = ["is_ignored", "is_of_default_loop", "kept_by_failure"]


def is_ignored(record: SocketRecord, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the file, the function or the module of any call of the birth."""
    frames = {*record.stack, *record.birth.stack, *record.culprit.stack}
    return any(_fits(frame, pattern) for frame in frames for pattern in patterns)


def _fits(frame: Frame, pattern: str) -> bool:
    filename = frame.filename.replace("\\", "/")
    names = (frame.module, frame.function, frame.function.rpartition(".")[2], filename)
    return any(fnmatchcase(name, pattern) for name in names) or fnmatchcase(
        filename, f"*/{pattern}"
    )


def is_of_default_loop(record: SocketRecord) -> bool:
    """Whether asyncio made it for the loop that it gives a thread which asks and has none.

    That loop is the thread's own and stays for whoever asks next.
    """
    return any(
        frame.module == "asyncio.events" and frame.function.endswith("Policy.get_event_loop")
        for frame in record.birth.stack
    )


def kept_by_failure(failures: Iterable[BaseException]) -> Iterator[object]:
    """The local variables that the tracebacks of failures keep alive, for who debugs them."""
    for error in _with_causes(failures):
        trace = native_field(error, BaseException, "__traceback__")
        while trace is not None:
            module = text_of(value_at(trace.tb_frame.f_globals, "__name__")) or ""
            if not module.startswith(("_pytest.", "pluggy.")):
                yield from _values_of(trace.tb_frame)
            trace = trace.tb_next


def _values_of(frame: FrameType) -> Iterable[object]:
    if frame.f_code.co_name == "<module>":
        return [value for _, value in items_of(frame.f_globals)]
    return locals_of(frame).values()


def _with_causes(failures: Iterable[BaseException]) -> Iterator[BaseException]:
    waiting: list[Any] = list(failures)
    seen = set[int]()
    while waiting:
        error = waiting.pop()
        if id(error) in seen or not is_a(error, BaseException):
            continue
        seen.add(id(error))
        yield error
        waiting += [native_field(error, BaseException, name) for name in _CAUSES]
        waiting += native_field(error, BaseExceptionGroup, "exceptions", ())


_CAUSES = ("__cause__", "__context__")
