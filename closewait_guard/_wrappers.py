"""What stands in place of the methods of the socket class: the original, and whoever listens.

Nothing that a listener raises reaches the program, whose own objects may be what fails.
"""

from __future__ import annotations

import _socket
import builtins
import errno
import functools
import socket
import threading
from collections.abc import Callable
from inspect import unwrap
from types import CodeType, FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any, Protocol

from closewait_guard._interruptions import interrupts

__all__ = [
    "CALLER",
    "SOCKET",
    "WRAPPERS",
    "Audience",
    "Listener",
    "accepting",
    "code_of",
    "taking_self",
]


class Listener(Protocol):
    """What a subscriber is told. Nothing that it raises reaches the program."""

    def born(self, sock: socket.socket, descriptor: object, /) -> None:
        """A socket was made; `descriptor` is the `fileno` argument, None if the kernel chose.

        The frame that made it is `CALLER` above the listener's own.
        """

    def detached(self, sock: socket.socket, fd: int, /) -> None:
        """A socket is about to give its descriptor away."""

    def got_file(self, sock: socket.socket, /) -> None:
        """A file object was made of a socket, so that `close()` may not be the end of it."""

    def dying(self, sock: socket.socket, fd: int, /) -> None:
        """A socket is being finalized while it is open. Take no lock here."""

    def exhausted(self) -> None:
        """No descriptor was left for a socket to be made or accepted."""

    def failed(self) -> None:
        """One of the calls above raised."""


# From a listener's `born` through our wrapper to the frame that made the socket.
CALLER = 2


def _socket_class() -> type[Any]:
    """The class itself: the name socket.socket may stand for a mock or gevent's class by now."""
    found = [
        cls
        for cls in _socket.socket.__subclasses__()
        if (cls.__module__, cls.__qualname__) == ("socket", "socket")
    ]
    # Where the module was loaded again, its newest class.
    return max(reversed(found), key=_evidence)


def _evidence(cls: type) -> tuple[bool, ...]:
    """That a class is the one of this interpreter's module `socket`; the strongest first.

    Until Python 3.11 all interpreters of a process share the class in C, and so what derives from
    it, but each has a `builtins` of its own, and every function refers to it.
    """
    functions: list[Any] = [value for value in vars(cls).values() if type(value) is FunctionType]
    return (
        cls is socket.socket,
        any(function.__builtins__ is vars(builtins) for function in functions),
        any(function.__globals__ is vars(socket) for function in functions),
    )


SOCKET: type[Any] = _socket_class()


def code_of(function: Any) -> CodeType | None:
    """The code of a function of the standard library, also if somebody has wrapped it before us."""
    return getattr(unwrap(function), "__code__", None)


def taking_self(found: Any) -> Callable[..., Any]:
    """What the class has there, as a function that takes the socket first.

    Somebody else's wrapper binds itself in its own way, and a mock not at all.
    """
    if type(found) in _BIND_PLAINLY:
        return found  # type: ignore[no-any-return]
    bind = getattr(type(found), "__get__", None)

    @functools.wraps(found)
    def call(self: socket.socket, *args: Any, **kwargs: Any) -> Any:
        bound = found if bind is None else bind(found, self, type(self))
        return bound(*args, **kwargs)

    return call


class Audience:
    """Who listens. Replaced as a whole, so that a loop in another thread misses nobody.

    Attributes:
        births: What each listener wants called at a birth, and when that has raised.
    """

    __slots__ = ("births", "listeners")

    def __init__(self) -> None:
        self.address(())

    def address(self, listeners: tuple[Listener, ...]) -> None:
        """Tell these from now on, and nobody else."""
        self.listeners = listeners
        # To look the methods up takes longer than to call them.
        self.births = tuple((listener.born, listener.failed) for listener in listeners)

    def tell(self, what: str, *told: object) -> None:
        """Call a method of each listener. Births go without: the hottest path, two frames deep."""
        for listener in self.listeners:
            try:
                getattr(listener, what)(*told)
            except BaseException as error:
                if interrupts(error):
                    raise
                listener.failed()


def _wrap_init(original: Any, audience: Audience) -> Any:
    """A plain function, because it costs a fifth of what a bound function wrapper does."""
    if getattr(original, "__code__", None) is not _INIT_CODE:
        return _wrap_foreign_init(original, audience)

    @functools.wraps(original)
    def __init__(  # noqa: N807 - it stands where the original stood
        self: socket.socket,
        family: int = -1,
        type: int = -1,  # noqa: A002
        proto: int = -1,
        fileno: int | None = None,
    ) -> None:
        try:
            original(self, family, type, proto, fileno)
        except OSError as error:
            _tell_if_exhausted(error, audience)
            raise
        for born, failed in audience.births:
            try:
                born(self, fileno)
            except BaseException as error:
                if interrupts(error):
                    raise
                failed()

    return __init__


def _wrap_foreign_init(original: Any, audience: Audience) -> Any:
    """Over somebody else's patch, which may care which arguments were given, and how."""

    @functools.wraps(original)
    def __init__(self: socket.socket, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        try:
            original(self, *args, **kwargs)
        except OSError as error:
            _tell_if_exhausted(error, audience)
            raise
        fileno = args[3] if len(args) > 3 else kwargs.get("fileno")
        for born, failed in audience.births:
            try:
                born(self, fileno)
            except BaseException as error:
                if interrupts(error):
                    raise
                failed()

    return __init__


def _tell_if_exhausted(error: OSError, audience: Audience) -> None:
    if error.errno in _EXHAUSTED:
        audience.tell("exhausted")


def _wrap_accept(original: Any, audience: Audience) -> Any:
    @functools.wraps(original)
    def accept(self: socket.socket) -> Any:
        thread = _get_ident()
        try:
            accepting[thread] = self
            return original(self)
        except OSError as error:
            _tell_if_exhausted(error, audience)
            raise
        finally:
            accepting.pop(thread, None)

    return accept


def _wrap_detach(original: Any, audience: Audience) -> Any:
    @functools.wraps(original)
    def detach(self: socket.socket) -> int:
        # Before it is: what a signal handler raises in between would lose the number.
        if (fd := _fileno(self)) >= 0:
            audience.tell("detached", self, fd)
        return original(self)  # type: ignore[no-any-return]

    return detach


def _wrap_makefile(original: Any, audience: Audience) -> Any:
    @functools.wraps(original)
    def makefile(self: socket.socket, *args: Any, **kwargs: Any) -> Any:
        file = original(self, *args, **kwargs)
        audience.tell("got_file", self)
        return file

    return makefile


# By thread, the listener that is in its accept(): who is born meanwhile need not look for it among
# the variables of a call, which takes longer than all the rest of a birth.
accepting: dict[int, socket.socket] = {}

_get_ident = threading.get_ident
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE})
_fileno = _socket.socket.fileno
_INIT_CODE = code_of(SOCKET.__init__)
_BIND_PLAINLY = (FunctionType, MethodDescriptorType, WrapperDescriptorType)

WRAPPERS: dict[str, Callable[[Any, Audience], Any]] = {
    "__init__": _wrap_init,
    "accept": _wrap_accept,
    "detach": _wrap_detach,
    "makefile": _wrap_makefile,
}
