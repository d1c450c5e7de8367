"""What stands in place of the finalizer of the socket class, and lets it run come what may."""

from __future__ import annotations

import _socket
import io
import socket
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from closewait_guard._interruptions import Later, interrupts
from closewait_guard._wrappers import SOCKET, Audience, code_of

__all__ = ["wrap_del"]

_fileno = _socket.socket.fileno


def wrap_del(original: Callable[[Any], Any], audience: Audience) -> Any:
    """Tells of sockets that die open; then the finalizer that was there is called.

    All that calls is in C: a signal handler may raise before the first bytecode of any function in
    Python, and at the recursion limit none can be called. So no frame of ours is on the stack when
    the C finalizer emits the ResourceWarning, which is attributed to the program's own line, as it
    is without the guard.

    A list compares each of its items with what is looked for: a call of each with the socket, one
    after the other, for none of them answers that it is equal. A cache of no size calls what it was
    made of, and is bound by the interpreter as a function is, without an object for each call.
    """

    class Source(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def _dealloc_warn(self, sock: socket.socket) -> None:
            fd = _fileno(sock)
            if fd >= 0:
                _tell(audience, later, sock, fd)

    # What is raised in there is dropped in C.
    notice = io.BufferedReader(Source(), 1)._dealloc_warn  # type: ignore[attr-defined]
    # The C finalizer calls `__repr__`, and drops what is raised in there.
    later = Later((Source._dealloc_warn.__code__, code_of(SOCKET.__repr__)))
    finalize: Any = lru_cache(0)([_calling(notice), _calling(original)].__contains__)
    finalize.__wrapped__ = original
    return finalize


def _calling(function: Callable[[Any], Any]) -> object:
    """An object that calls a function with whatever it is compared with."""
    return type("Calling", (), {"__eq__": staticmethod(function)})()


def _tell(audience: Audience, later: Later, sock: socket.socket, fd: int) -> None:
    for listener in audience.listeners:
        try:
            listener.dying(sock, fd)
        except BaseException as error:
            if interrupts(error):
                later.deliver(error)
            else:
                listener.failed()
