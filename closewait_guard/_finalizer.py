"""What stands in place of the finalizer of the socket class, and lets it run come what may."""

from __future__ import annotations

import _socket
import io
import socket
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from closewait_guard._interruptions import Later, interrupts
from closewait_guard._wrappers import SOCKET, Audience, code_of

__all__ = ["wrap_del"]

_fileno = _socket.socket.fileno
_IN_C = _socket.socket.__del__  # type: ignore[attr-defined]


def wrap_del(original: Callable[[Any], Any], audience: Audience) -> Any:
    """Tells of sockets that die open; then the finalizer that was there is called.

    All that calls is in C: a signal handler may raise before the first bytecode of any function in
    Python, and at the recursion limit none can be called. So no frame of ours is on the stack when
    the C finalizer emits the ResourceWarning, which is attributed to the program's own line, as it
    is without the guard. Of a closed socket nobody is told, and no bytecode of ours runs at all.

    A list compares each of its items with what is looked for: a call of each with the socket, one
    after the other, until one answers that it is equal. A cache of no size calls what it was made
    of, and is bound by the interpreter as a function is, without an object for each call.
    """

    def tell(sock: socket.socket) -> None:
        _tell(audience, later, sock, _fileno(sock))

    # The C finalizer calls `__repr__`, and drops what is raised in there.
    later = Later((tell.__code__, code_of(SOCKET.__repr__)))
    calls = [_with_method("__eq__", each) for each in (_is_closed, _dropping_errors(tell))]
    if original is not _IN_C:
        # That of a closed socket is to be called too.
        calls = [_with_method("__eq__", _dropping_errors(calls.__contains__))]
    calls.append(_with_method("__eq__", original))
    finalize: Any = lru_cache(0)(calls.__contains__)
    finalize.__wrapped__ = original
    return finalize


def _with_method(name: str, function: Callable[[Any], Any]) -> object:
    """An object that calls a function with the other operand."""
    return type("Calling", (), {name: staticmethod(function)})()


def _dropping_errors(function: Callable[[Any], Any]) -> Callable[[Any], None]:
    """The same; what is raised in there is dropped in C."""

    class Source(io.RawIOBase):
        _dealloc_warn = staticmethod(function)

        def readable(self) -> bool:
            return True

    return io.BufferedReader(Source(), 1)._dealloc_warn  # type: ignore[attr-defined,no-any-return]


# A sum asks each of the terms to add itself to what there is: first to the socket, which cannot be
# added to anything, then to its number.
_is_closed: Any = partial(
    sum,
    (_with_method("__radd__", _fileno), _with_method("__radd__", frozenset({-1}).__contains__)),
)


def _tell(audience: Audience, later: Later, sock: socket.socket, fd: int) -> None:
    for listener in audience.listeners:
        try:
            listener.dying(sock, fd)
        except BaseException as error:
            if interrupts(error):
                later.deliver(error)
            else:
                listener.failed()
