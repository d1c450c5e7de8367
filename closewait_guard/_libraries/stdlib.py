"""The standard library: http.client, asyncio, multiprocessing, tracebacks, bare C sockets."""

from __future__ import annotations

import _socket
from collections.abc import Iterable
from typing import Any

from closewait_guard._cpython import CONNECTION_HANDLE
from closewait_guard._libraries.kinds import HolderHint, Library, OwnerKind
from closewait_guard._live import field, number_of
from closewait_guard.model import Origin, Verdict

__all__ = [
    "LIBRARIES",
    "LOOP_WAKER",
    "TRACEBACK",
]


def _fileno(sock: Any) -> Iterable[int]:
    return (_socket.socket.fileno(sock),)


def _handle(connection: Any) -> Iterable[int]:
    fd = number_of(field(connection, CONNECTION_HANDLE))
    return () if fd is None else (fd,)


# Its hint comes before those of all libraries: no close() is reached while the exception is kept.
TRACEBACK = Library(
    "traceback",
    hints=(
        HolderHint(
            "traceback",
            "an exception that is kept keeps its frames and their variables: close the socket in "
            "a finally block, and do not store the exception longer than needed",
        ),
    ),
)

# The call that opens the two sockets by which an event loop wakes itself.
LOOP_WAKER = "asyncio.selector_events.BaseSelectorEventLoop._make_self_pipe"

LIBRARIES = (
    # Among the objects of these classes are those of gevent's socket class.
    Library("_socket", owners=(OwnerKind(("_socket:socket",), _fileno),)),
    Library(
        "multiprocessing",
        owners=(OwnerKind(("multiprocessing.connection:Connection",), _handle),),
    ),
    Library(
        "urllib",
        hints=(
            HolderHint(
                "urllib.request",
                "read the response to its end, or use `with urlopen(...) as response:`, or call "
                "response.close()",
                (Verdict.DROPPED,),
            ),
        ),
    ),
    Library(
        "http.client",
        hints=(
            HolderHint(
                "http.client.HTTPResponse",
                "read the response to its end, or use `with` around it, or call response.close()",
            ),
            HolderHint(
                "http.client.HTTPConnection",
                "call connection.close(), which does not close a response that is being read: "
                "close the response too; `with contextlib.closing(connection):` helps",
            ),
        ),
    ),
    Library(
        "asyncio",
        hints=(
            HolderHint(
                LOOP_WAKER,
                "an event loop that was never closed: run it by asyncio.run(), or call "
                "loop.close() in a finally block",
            ),
            HolderHint(
                "asyncio",
                "the handler of this connection must end it: `writer.close()` and "
                "`await writer.wait_closed()` in a finally block",
                origin=Origin.ACCEPTED,
            ),
            HolderHint(
                "asyncio",
                "`writer.close()` and `await writer.wait_closed()` in a finally block; for a bare "
                "transport transport.close()",
            ),
        ),
    ),
)
