"""The standard library: http.client, asyncio, multiprocessing, tracebacks, bare C sockets."""

from __future__ import annotations

import _socket
from collections.abc import Iterable, Iterator
from typing import Any

from closewait_guard._cpython import (
    CONNECTION_HANDLE,
    LOOP_CLOSED,
    LOOP_OF,
    LOOP_SELECTOR,
    LOOP_THREAD,
    LOOP_WAKERS,
)
from closewait_guard._enums import DescriptorKind, Origin, Verdict
from closewait_guard._libraries.kinds import HandleKind, HolderHint, Library, OwnerKind
from closewait_guard._live import call_native, field, layers_of, number_of, type_name

__all__ = [
    "LIBRARIES",
    "LOOP_WAKER",
    "RUNNING",
    "RUNNING_CALL",
    "TRACEBACK",
    "loop_of",
]


def _fileno(sock: Any) -> Iterable[int]:
    return (_socket.socket.fileno(sock),)


def _handle(connection: Any) -> Iterable[int]:
    fd = number_of(field(connection, CONNECTION_HANDLE))
    return () if fd is None else (fd,)


def _wakers(loop: Any) -> Iterable[object]:
    return [field(loop, name) for name in LOOP_WAKERS]


def loop_of(connections: Iterable[object]) -> object:
    """The event loop of some connections; None if it is not known, or they have several."""
    loops = (field(layer, LOOP_OF) for each in connections for layer in layers_of(each))
    found = {id(loop): loop for loop in loops if loop is not None}
    return next(iter(found.values())) if len(found) == 1 else None


def _selector_of(loop: Any) -> Iterator[tuple[DescriptorKind, int]]:
    epoll = field(field(loop, LOOP_SELECTOR), LOOP_SELECTOR)
    if type_name(epoll) == "select.epoll":
        yield DescriptorKind.EPOLL, call_native(epoll, type(epoll), "fileno")


# Its hint comes before those of all libraries: no close() is reached while the exception is kept.
TRACEBACK = Library(
    "traceback",
    hints=(
        HolderHint(
            "traceback",
            "close the socket in a `finally` block, and do not keep the exception: it keeps this "
            "frame and its socket alive",
        ),
    ),
)

# The holder of a socket that only a variable in a call of another thread has.
RUNNING_CALL = "running call"

# Its hint comes before those of all libraries, too: such a call may well be in a `with` block.
RUNNING = Library(
    RUNNING_CALL,
    hints=(
        HolderHint(
            RUNNING_CALL,
            "let the call that holds it end, or close it there: give what that call waits for a "
            "timeout",
            (Verdict.LEAKED, Verdict.DEAD),
        ),
    ),
)

# The call that opens the two sockets by which an event loop wakes itself.
LOOP_WAKER = "asyncio.selector_events.BaseSelectorEventLoop._make_self_pipe"

LIBRARIES = (
    # Among the objects of these classes are those of gevent's socket class.
    Library("_socket", handles=(HandleKind(("_socket:socket",), _fileno),)),
    Library(
        "multiprocessing",
        handles=(HandleKind(("multiprocessing.connection:Connection",), _handle),),
    ),
    Library(
        "urllib",
        hints=(
            HolderHint(
                "urllib.request",
                "close the response: use `with urlopen(...) as response:`, call "
                "response.close(), or read it to the end",
                (Verdict.DROPPED,),
            ),
        ),
    ),
    Library(
        "http.client",
        hints=(
            HolderHint(
                "http.client.HTTPResponse",
                "close the response: use `with`, call response.close(), or read it to the end",
            ),
            HolderHint(
                "http.client.HTTPConnection",
                "call connection.close(), or use `with contextlib.closing(connection):`; a "
                "response that is not read to the end needs its own close()",
            ),
        ),
    ),
    Library(
        "asyncio",
        owners=(
            OwnerKind(
                "asyncio.base_events:BaseEventLoop",
                "asyncio event loop",
                lambda loop: field(loop, LOOP_CLOSED) is True,
                _wakers,
                descriptors=_selector_of,
                is_idle=lambda loop: field(loop, LOOP_THREAD) is None,
                is_surplus=False,
            ),
        ),
        hints=(
            HolderHint(
                "asyncio.base_events.BaseEventLoop",
                "close the event loop: use asyncio.run(), or call loop.close() in a `finally` "
                "block",
                (Verdict.UNCLOSED,),
            ),
            HolderHint(
                LOOP_WAKER,
                "close the event loop: use asyncio.run(), or call loop.close() in a `finally` "
                "block",
            ),
            HolderHint(
                "asyncio",
                "close the writer in the handler's `finally` block: `writer.close()`, then `await "
                "writer.wait_closed()`",
                origin=Origin.ACCEPTED,
            ),
            HolderHint(
                "asyncio",
                "close the writer in a `finally` block: `writer.close()`, then `await "
                "writer.wait_closed()`; a bare transport needs transport.close()",
            ),
        ),
    ),
)
