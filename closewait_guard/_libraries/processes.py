"""Child processes of the standard library: subprocess, pools of multiprocessing, the executor."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator
from typing import Any

from closewait_guard._cpython import (
    CONNECTION_HANDLE,
    EXECUTOR_CLOSED,
    EXECUTOR_QUEUES,
    EXECUTOR_THREAD,
    LOOP_OF,
    POOL_QUEUES,
    POOL_STATE,
    POOL_TASKS,
    POOL_THREADS,
    QUEUE_ENDS,
    QUEUE_THREAD,
    TRANSPORT_CLOSED,
    TRANSPORT_PROCESS,
)
from closewait_guard._enums import DescriptorKind, Verdict
from closewait_guard._libraries.kinds import HolderHint, Library, OwnerKind
from closewait_guard._live import (
    call_native,
    field,
    is_a,
    items_of,
    native_field,
    number_of,
    text_of,
)

__all__ = [
    "LIBRARIES",
]


_PIPES = "stdin", "stdout", "stderr"
_FILES = io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.FileIO


def _open_pipes(process: Any) -> Iterator[tuple[DescriptorKind, int]]:
    for pipe in (field(process, name) for name in _PIPES):
        for cls in _FILES:
            if is_a(pipe, cls) and not native_field(pipe, cls, "closed"):
                fd = call_native(pipe, cls, "fileno")
                # asyncio may have a socket in its place, which is recorded itself.
                if stat.S_ISFIFO(os.fstat(fd).st_mode):
                    yield DescriptorKind.PIPE, fd


def _is_finished(process: Any) -> bool:
    return field(process, "returncode") is not None and not any(_open_pipes(process))


def _has_ended(process: Any) -> bool:
    """Whether the child has, without taking its status from what is to wait for it."""
    pid = number_of(field(process, "pid"))
    if field(process, "returncode") is not None or pid is None:
        return True
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True  # Something else has waited for it.
    except AttributeError:
        return False  # Not on this platform.


def _is_transport_closed(transport: Any) -> bool:
    # When the child has ended and all its pipes are closed, the transport lets go of it.
    has_process = field(transport, TRANSPORT_PROCESS) is not None
    return field(transport, TRANSPORT_CLOSED) is not False or not has_process


def _pipes_of(pool: Any) -> Iterator[tuple[DescriptorKind, int]]:
    for queue in (field(pool, name) for name in (*POOL_QUEUES, *EXECUTOR_QUEUES)):
        for end in QUEUE_ENDS:
            fd = number_of(field(field(queue, end), CONNECTION_HANDLE))
            if fd is not None:
                yield DescriptorKind.PIPE, fd


def _threads_of(pool: Any) -> Iterable[object]:
    feeder = field(field(pool, EXECUTOR_QUEUES[0]), QUEUE_THREAD)
    return [*(field(pool, name) for name in (*POOL_THREADS, EXECUTOR_THREAD)), feeder]


def _has_no_tasks(pool: Any) -> bool:
    return not any(items_of(field(pool, name)) for name in POOL_TASKS)


def _pool_kind(name: str) -> OwnerKind:
    return OwnerKind(
        f"multiprocessing.pool:{name}",
        f"multiprocessing.pool.{name}",
        lambda pool: text_of(field(pool, POOL_STATE)) != "RUN",
        descriptors=_pipes_of,
        threads=_threads_of,
        is_idle=_has_no_tasks,
    )


_COMMUNICATE = (
    "use `with subprocess.Popen(...) as process:`, or call process.communicate(), which reads and "
    "closes the pipes and waits for the child"
)
_END_OF_POOL = (
    "use `with multiprocessing.Pool() as pool:`, or call pool.close() and pool.join() in a "
    "`finally` block; one pool is enough for all calls"
)

LIBRARIES = (
    Library(
        "subprocess",
        owners=(
            OwnerKind(
                "subprocess:Popen",
                "subprocess.Popen",
                _is_finished,
                descriptors=_open_pipes,
                is_idle=_has_ended,
                is_surplus=False,
                part_of=("asyncio",),
            ),
            OwnerKind(
                "asyncio.base_subprocess:BaseSubprocessTransport",
                "asyncio subprocess",
                _is_transport_closed,
                descriptors=lambda transport: _open_pipes(field(transport, TRANSPORT_PROCESS)),
                is_idle=lambda transport: _has_ended(field(transport, TRANSPORT_PROCESS)),
                is_surplus=False,
                loop=lambda transport: field(transport, LOOP_OF),
                needs_connections=False,
            ),
        ),
        hints=(
            HolderHint("subprocess.Popen", _COMMUNICATE, (Verdict.UNCLOSED,)),
            HolderHint(
                "asyncio.base_subprocess.BaseSubprocessTransport",
                "`await process.communicate()`, or read its pipes to the end and `await "
                "process.wait()`, before the event loop is closed",
                (Verdict.UNCLOSED,),
            ),
        ),
    ),
    Library(
        "multiprocessing.pool",
        owners=(_pool_kind("Pool"), _pool_kind("ThreadPool")),
        hints=(
            HolderHint("multiprocessing.pool", _END_OF_POOL, (Verdict.UNCLOSED, Verdict.SURPLUS)),
        ),
    ),
    Library(
        "concurrent.futures",
        owners=(
            OwnerKind(
                "concurrent.futures.process:ProcessPoolExecutor",
                "concurrent.futures.ProcessPoolExecutor",
                lambda pool: field(pool, EXECUTOR_CLOSED) is True,
                # Its thread notices that it was collected, and ends with its processes.
                closes_itself=True,
                descriptors=_pipes_of,
                threads=_threads_of,
                is_idle=_has_no_tasks,
            ),
        ),
        hints=(
            HolderHint(
                "concurrent.futures.process.ProcessPoolExecutor",
                "use one executor for all calls, or `with ProcessPoolExecutor() as executor:`",
                (Verdict.SURPLUS,),
            ),
        ),
    ),
)
