"""The wrappers of the methods of the socket class: they call the original, and the subscribers.

Nothing that a subscriber raises reaches the program.
"""

from __future__ import annotations

import _socket
import builtins
import errno
import functools
import socket
import sys
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from types import CodeType, FrameType, FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any, Protocol

from closewait_guard._cpython import current_frame, dropping_errors
from closewait_guard._interruptions import DeferredErrors, interrupts
from closewait_guard.exceptions import UnsupportedPythonError

__all__ = [
    "FRAMES_TO_CALLER",
    "SOCKET",
    "WRAPPERS",
    "WRAPPERS_OF_OTHERS",
    "SocketEvents",
    "Subscribers",
    "as_function",
    "caller_of_hooks",
    "code_of",
    "listener_in_accept_by_thread",
    "method_object",
    "wrap_close",
]


class SocketEvents(Protocol):
    """What a subscriber is called for. Nothing that it raises reaches the program."""

    def on_create(self, sock: socket.socket, descriptor: object, /) -> None:
        """A socket was created; `descriptor` is the `fileno` argument, None if the kernel chose.

        The frame that created it is `FRAMES_TO_CALLER` above the subscriber's own.
        """

    def on_detach(self, sock: socket.socket, fd: int, /) -> None:
        """A socket is about to give its descriptor away."""

    def on_makefile(self, sock: socket.socket, /) -> None:
        """A file object was made of a socket, so that `close()` may not be the end of it."""

    def on_finalize(self, sock: socket.socket, fd: int, /) -> None:
        """A socket is being finalized while it is open. Take no lock here."""

    def on_close_in_collection(self, sock: socket.socket, fd: int, /) -> None:
        """A socket is being closed while the garbage collector runs. Take no lock here."""

    def on_fd_exhausted(self) -> None:
        """No descriptor was left for a socket to be made or accepted."""

    def on_error(self) -> None:
        """One of the calls above raised."""


# From `on_create` of a subscriber through our wrapper to the frame that created the socket.
FRAMES_TO_CALLER = 2


def caller_of_hooks() -> FrameType | None:
    """From within a subscriber, the frame that called what is wrapped."""
    frame: FrameType | None = current_frame(2)
    while frame is not None and frame.f_globals is globals():
        frame = frame.f_back
    return frame


def _require_cpython() -> None:
    """Refuse interpreters whose finalizers, frames and collector do not work as CPython's.

    Raises:
        UnsupportedPythonError: This is one of them.
    """
    if sys.implementation.name != "cpython":
        from platform import python_implementation

        found = f"{python_implementation()} {sys.version.split()[0]}"
        raise UnsupportedPythonError(
            f"closewait_guard needs CPython, and this is {found}: it does not show when a socket "
            "object is collected, nor what holds it"
        )


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


_require_cpython()
SOCKET: type[Any] = _socket_class()


def code_of(function: Any) -> CodeType | None:
    """The code of a function of the standard library, also if another library has wrapped it."""
    # As `inspect.unwrap` does, whose module takes long to import.
    seen = {id(function)}
    while (inner := getattr(function, "__wrapped__", None)) is not None and id(inner) not in seen:
        function = inner
        seen.add(id(inner))
    return getattr(function, "__code__", None)


def as_function(found: Any) -> Callable[..., Any]:
    """What the class has there, as a function that takes the socket first.

    A wrapper of another library binds itself in its own way, and a mock not at all.
    """
    if type(found) in _BIND_PLAINLY:
        return found  # type: ignore[no-any-return]
    bind = getattr(type(found), "__get__", None)

    @functools.wraps(found)
    def call(self: socket.socket, *args: Any, **kwargs: Any) -> Any:
        bound = found if bind is None else bind(found, self, type(self))
        return bound(*args, **kwargs)

    return call


class Subscribers:
    """What to call. Replaced as a whole, so that a loop in another thread misses none.

    Attributes:
        creation_calls: What to call for a socket that was created, and when that raises.
        makefile_calls: The same for a file object that was made of one.
        speedups: Whether what calls them may be in C.
    """

    __slots__ = ("creation_calls", "current", "makefile_calls", "speedups")

    def __init__(self, *, speedups: bool = False) -> None:
        self.speedups = speedups
        self.replace(())

    def replace(self, subscribers: tuple[SocketEvents, ...]) -> None:
        """Call these from now on, and no others."""
        self.current = subscribers
        # To look the methods up takes longer than to call them.
        self.creation_calls = tuple((each.on_create, each.on_error) for each in subscribers)
        self.makefile_calls = tuple((each.on_makefile, each.on_error) for each in subscribers)

    def notify_detach(self, sock: socket.socket, fd: int) -> None:
        """A socket is about to give its descriptor away."""
        self._notify(lambda subscriber: subscriber.on_detach(sock, fd))

    def notify_fd_exhausted(self) -> None:
        """No descriptor was left."""
        self._notify(lambda subscriber: subscriber.on_fd_exhausted())

    def _notify(self, call: Callable[[SocketEvents], None]) -> None:
        # A creation and a file object go without: those are the hottest paths.
        for subscriber in self.current:
            try:
                call(subscriber)
            except BaseException as error:
                if interrupts(error):
                    raise
                subscriber.on_error()


def _wrap_init(original: Any, subscribers: Subscribers) -> Any:
    """A plain function, because it costs a fifth of what a bound function wrapper does."""
    if getattr(original, "__code__", None) is not _INIT_CODE:
        return _wrap_foreign_init(original, subscribers)

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
            _notify_if_exhausted(error, subscribers)
            raise
        for on_create, on_error in subscribers.creation_calls:
            try:
                on_create(self, fileno)
            except BaseException as error:
                if interrupts(error):
                    raise
                on_error()

    return __init__


def _wrap_foreign_init(original: Any, subscribers: Subscribers) -> Any:
    """Over the patch of another library, which may depend on how arguments were given."""

    @functools.wraps(original)
    def __init__(self: socket.socket, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        try:
            original(self, *args, **kwargs)
        except OSError as error:
            _notify_if_exhausted(error, subscribers)
            raise
        fileno = args[3] if len(args) > 3 else kwargs.get("fileno")
        for on_create, on_error in subscribers.creation_calls:
            try:
                on_create(self, fileno)
            except BaseException as error:
                if interrupts(error):
                    raise
                on_error()

    return __init__


def _notify_if_exhausted(error: OSError, subscribers: Subscribers) -> None:
    if error.errno in _EXHAUSTED:
        subscribers.notify_fd_exhausted()


def _wrap_accept(original: Any, subscribers: Subscribers) -> Any:
    @functools.wraps(original)
    def accept(self: socket.socket) -> Any:
        thread = _get_ident()
        try:
            listener_in_accept_by_thread[thread] = self
            return original(self)
        except OSError as error:
            _notify_if_exhausted(error, subscribers)
            raise
        finally:
            listener_in_accept_by_thread.pop(thread, None)

    return accept


def _wrap_detach(original: Any, subscribers: Subscribers) -> Any:
    @functools.wraps(original)
    def detach(self: socket.socket) -> int:
        # Before it is: what a signal handler raises in between would lose the number.
        if (fd := _fileno(self)) >= 0:
            subscribers.notify_detach(self, fd)
        return original(self)  # type: ignore[no-any-return]

    return detach


def _wrap_makefile(original: Any, subscribers: Subscribers) -> Any:
    @functools.wraps(original)
    def makefile(self: socket.socket, *args: Any, **kwargs: Any) -> Any:
        file = original(self, *args, **kwargs)
        for on_makefile, on_error in subscribers.makefile_calls:
            try:
                on_makefile(self)
            except BaseException as error:
                if interrupts(error):
                    raise
                on_error()
        return file

    return makefile


# By thread, the listener that is in its accept(): a socket created meanwhile need not look for it
# among the variables of a call, which takes longer than all the rest of its creation.
listener_in_accept_by_thread: dict[int, socket.socket] = {}

_get_ident = threading.get_ident
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE})
_fileno = _socket.socket.fileno
_INIT_CODE = code_of(SOCKET.__init__)
_BIND_PLAINLY = (FunctionType, MethodDescriptorType, WrapperDescriptorType)

_IN_C = _socket.socket.__del__  # type: ignore[attr-defined]


def wrap_del(original: Callable[[Any], Any], subscribers: Subscribers) -> Any:
    """Notifies of sockets that are finalized while open; then calls the finalizer that was there.

    All that calls is in C: a signal handler may raise before the first bytecode of any function in
    Python, and at the recursion limit none can be called. So no frame of ours is on the stack when
    the C finalizer emits the ResourceWarning, which is attributed to the program's own line, as it
    is without the guard. For a closed socket no bytecode of ours runs at all.

    Without the extension, a list compares each of its items with what is looked for: a call of each
    with the socket, one after the other, until one answers that it is equal. A cache of no size
    calls what it was made of, and is bound by the interpreter as a function is, without an object
    for each call.
    """

    def notify(sock: socket.socket) -> None:
        fd = _fileno(sock)
        _notify_quietly(subscribers, deferred, lambda each: each.on_finalize, sock, fd)

    # The C finalizer calls `__repr__`, and drops what is raised in there.
    deferred = DeferredErrors((notify.__code__, code_of(SOCKET.__repr__)))
    if subscribers.speedups:
        # Loaded late: a run of tests without sockets needs only the class that is patched.
        from closewait_guard._capture.speedups import find_speedups

        if (found := find_speedups()) is not None:
            return found.finalizer(_fileno, notify, original, is_for_open_only=original is _IN_C)
    calls = [method_object("__eq__", each) for each in (_is_closed, dropping_errors(notify))]
    if original is not _IN_C:
        # That of a closed socket is to be called too.
        calls = [method_object("__eq__", dropping_errors(calls.__contains__))]
    calls.append(method_object("__eq__", original))
    finalize: Any = lru_cache(0)(calls.__contains__)
    finalize.__wrapped__ = original
    return finalize


def method_object(name: str, function: Callable[[Any], Any]) -> object:
    """An object that calls a function with the other operand."""
    return type("Calling", (), {name: staticmethod(function)})()


# A sum asks each of the terms to add itself to what there is: first to the socket, which cannot be
# added to anything, then to its number.
_is_closed: Any = partial(
    sum,
    (method_object("__radd__", _fileno), method_object("__radd__", frozenset({-1}).__contains__)),
)


def wrap_close(original: Callable[[Any], Any], subscribers: Subscribers) -> Callable[[Any], Any]:
    """Notifies of sockets that are closed while the garbage collector runs; then closes them.

    All that calls is in C here too: what closes them is a finalizer, as a rule.
    """

    def notify(sock: socket.socket) -> None:
        if (fd := _fileno(sock)) >= 0:
            _notify_quietly(
                subscribers, deferred, lambda each: each.on_close_in_collection, sock, fd
            )

    deferred = DeferredErrors((notify.__code__,))
    calls = [method_object("__eq__", each) for each in (dropping_errors(notify), original)]
    return calls.__contains__


def _notify_quietly(
    subscribers: Subscribers,
    deferred: DeferredErrors,
    method: Callable[[SocketEvents], Callable[[socket.socket, int], None]],
    sock: socket.socket,
    fd: int,
) -> None:
    """In a finalizer, where nothing that is raised reaches the program.

    No closure refers to the socket: `is_garbage` would find it.
    """
    for subscriber in subscribers.current:
        try:
            method(subscriber)(sock, fd)
        except BaseException as error:
            if interrupts(error):
                deferred.raise_later(error)
            else:
                subscriber.on_error()


WRAPPERS: dict[str, Callable[[Any, Subscribers], Any]] = {
    "__init__": _wrap_init,
    "accept": _wrap_accept,
    "detach": _wrap_detach,
    "makefile": _wrap_makefile,
    "__del__": wrap_del,
}
# Of a class that derives from that in C: the rest it has in another way, or not at all.
WRAPPERS_OF_OTHERS = {
    "__init__": _wrap_foreign_init,
    "detach": _wrap_detach,
    "__del__": wrap_del,
}
