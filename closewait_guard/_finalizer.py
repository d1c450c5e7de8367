"""What stands in place of the finalizer of the socket class, and lets it run come what may."""

from __future__ import annotations

import _socket
import io
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from closewait_guard._interruptions import Later, interrupts
from closewait_guard._wrappers import SOCKET, Audience, code_of

__all__ = ["wrap_del"]

_fileno = _socket.socket.fileno


class _Dying(partial[None]):
    """Made of a `Notice` and a socket: tells of it at once, and finalizes it when it is called."""

    # What is raised in there is dropped in C.
    __init__ = staticmethod(io.BufferedReader._dealloc_warn)  # type: ignore[attr-defined]


def wrap_del(original: Callable[[Any], Any], audience: Audience) -> Any:
    """Tells of sockets that die open; then the finalizer that was there is called.

    The interpreter asks the class for `__del__`, binds it to the dying socket and calls the result.
    Being told while binding leaves no frame of ours on the stack when the C finalizer emits the
    ResourceWarning: it is attributed to the program's own line, as it is without the guard.

    All that binds and calls is in C: a signal handler may raise before the first bytecode of any
    function in Python, and at the recursion limit none can be called.
    """

    class Source(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def _dealloc_warn(self, sock: socket.socket) -> None:
            fd = _fileno(sock)
            if fd >= 0:
                _tell(audience, later, sock, fd)

    class Notice(io.BufferedReader):
        __call__ = staticmethod(original)

    class Finalizer(property):
        __call__ = __wrapped__ = staticmethod(original)

    # The C finalizer calls `__repr__`, and drops what is raised in there.
    later = Later((Source._dealloc_warn.__code__, code_of(SOCKET.__repr__)))
    return Finalizer(partial(_Dying, Notice(Source(), 1)))


def _tell(audience: Audience, later: Later, sock: socket.socket, fd: int) -> None:
    for listener in audience.listeners:
        try:
            listener.dying(sock, fd)
        except BaseException as error:
            if interrupts(error):
                later.deliver(error)
            else:
                listener.failed()
