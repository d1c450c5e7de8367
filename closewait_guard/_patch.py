"""The only place that patches: who subscribes here is told of every birth, detachment and death.

All guards of a process share one patch. It goes on with the first subscriber and off with the last.
"""

from __future__ import annotations

import _socket
import functools
import socket
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

__all__ = [
    "CALLER",
    "SOCKET",
    "Listener",
    "after_fork",
    "changing",
    "is_patched",
    "replaced_by",
    "subscribe",
    "unsubscribe",
]


class Listener(Protocol):
    """What a subscriber is told. Nothing that it raises reaches the program."""

    def born(self, sock: socket.socket, descriptor: object, /) -> None:
        """A socket was made; `descriptor` is the `fileno` argument, None if the kernel chose.

        The frame that made it is `CALLER` above the listener's own.
        """

    def detached(self, sock: socket.socket, fd: int, /) -> None:
        """A socket gave its descriptor away."""

    def got_file(self, sock: socket.socket, /) -> None:
        """A file object was made of a socket, so that `close()` may not be the end of it."""

    def dying(self, sock: socket.socket, fd: int, /) -> None:
        """A socket is being finalized while it is open. Take no lock here."""

    def failed(self) -> None:
        """One of the calls above raised."""


# From a listener's `born` through our wrapper to the frame that made the socket.
CALLER = 2

# The class itself: the name socket.socket may stand for a mock or for gevent's class by now.
SOCKET: type[Any] = next(
    cls
    for cls in _socket.socket.__subclasses__()
    if (cls.__module__, cls.__qualname__) == ("socket", "socket")
)

_listeners: list[Listener] = []
_lock = threading.RLock()


def changing() -> threading.RLock:
    """The one lock of installing and uninstalling. Nothing that happens to a socket takes it."""
    return _lock


def after_fork() -> None:
    """In the child: a lock that another thread held at the fork would never be released."""
    global _lock
    _lock = threading.RLock()


def subscribe(listener: Listener) -> None:
    """Tell `listener` of what happens to sockets from now on."""
    with changing():
        if listener not in _listeners:
            _listeners.append(listener)
        _tell()


def unsubscribe(listener: Listener) -> None:
    """Stop telling `listener`; the last one to go leaves the class as it was found."""
    with changing():
        if listener in _listeners:
            _listeners.remove(listener)
        _tell()


def _tell() -> None:
    for method in _METHODS:
        method.tell(tuple(_listeners))


def is_patched() -> bool:
    """Whether anything of ours is on the socket class, be it silent."""
    return any(method.top() is not None for method in _METHODS)


def replaced_by() -> str | None:
    """The module that has put a wrapper over ours, if one has."""
    for method in _METHODS:
        if method.is_covered():
            return str(getattr(method.present, "__module__", None) or type(method.present))
    return None


class _Audience:
    """Who listens. Replaced as a whole, so that a loop in another thread misses nobody."""

    __slots__ = ("listeners",)

    def __init__(self) -> None:
        self.listeners: tuple[Listener, ...] = ()


class _Layer(NamedTuple):
    """One wrapper of ours, and what it was put over."""

    ours: Any
    found: Any
    was_own: bool
    audience: _Audience


class _Method:
    """One method of the socket class, patched in place and restored exactly.

    A wrapper that somebody else has wrapped cannot be taken out. It falls silent, and is
    remembered: should it come to light again, it is used again, or removed.
    """

    def __init__(self, name: str, wrap: Callable[[Any, _Audience], Any]) -> None:
        self.name = name
        self._wrap = wrap
        self._layers: list[_Layer] = []

    @property
    def present(self) -> Any:
        """What the class itself has there, not what it inherits."""
        return vars(SOCKET).get(self.name)

    def top(self) -> _Layer | None:
        """Our layer, be it silent, if it is what the class has there now."""
        return next((layer for layer in self._layers if layer.ours is self.present), None)

    def is_covered(self) -> bool:
        """Whether a listener is told through somebody else's wrapper, if at all."""
        return self.top() is None and any(layer.audience.listeners for layer in self._layers)

    def tell(self, listeners: tuple[Listener, ...]) -> None:
        """Make `listeners` the only ones who are told; take our wrapper out if there are none."""
        told = self._told() or (self._added() if listeners else None)
        if told is not None:
            told.audience.listeners = listeners
        if not listeners:
            self._remove()

    def _told(self) -> _Layer | None:
        """The layer in use: the one that somebody listens to, else a silent one on top."""
        heard = (layer for layer in self._layers if layer.audience.listeners)
        return next(heard, None) or self.top()

    def _added(self) -> _Layer:
        import wrapt

        audience, found, was_own = _Audience(), self.present, self.name in vars(SOCKET)
        # Its stubs know of factories that make proxies only; it takes any.
        factory: Any = self._wrap
        wrapt.wrap_object(SOCKET, self.name, factory, (audience,))
        self._layers.append(_Layer(self.present, found, was_own, audience))
        return self._layers[-1]

    def _remove(self) -> None:
        while (layer := self.top()) is not None:
            if layer.was_own:
                setattr(SOCKET, self.name, layer.found)
            else:
                # wrapt finds inherited methods too: a copy of one must not stay behind.
                delattr(SOCKET, self.name)
            self._layers.remove(layer)


def _wrap_init(original: Any, audience: _Audience) -> Any:
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
        original(self, family, type, proto, fileno)
        for listener in audience.listeners:
            try:
                listener.born(self, fileno)
            except Exception:
                listener.failed()

    return __init__


def _wrap_foreign_init(original: Any, audience: _Audience) -> Any:
    """Over somebody else's patch, which may care which arguments were given, and how."""

    @functools.wraps(original)
    def __init__(self: socket.socket, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        fileno = args[3] if len(args) > 3 else kwargs.get("fileno")
        for listener in audience.listeners:
            try:
                listener.born(self, fileno)
            except Exception:
                listener.failed()

    return __init__


def _wrap_detach(original: Any, audience: _Audience) -> Any:
    @functools.wraps(original)
    def detach(self: socket.socket) -> int:
        fd: int = original(self)
        for listener in audience.listeners:
            try:
                listener.detached(self, fd)
            except Exception:
                listener.failed()
        return fd

    return detach


def _wrap_makefile(original: Any, audience: _Audience) -> Any:
    @functools.wraps(original)
    def makefile(self: socket.socket, *args: Any, **kwargs: Any) -> Any:
        file = original(self, *args, **kwargs)
        for listener in audience.listeners:
            try:
                listener.got_file(self)
            except Exception:
                listener.failed()
        return file

    return makefile


class _Finalizer:
    """Tells of sockets that die open, then hands over the finalizer that was there.

    The interpreter asks the class for `__del__`, binds it to the dying socket and calls the
    result. Being told while binding, and giving back the C finalizer itself, leaves no frame of
    ours on the stack when that one emits the ResourceWarning: it is attributed to the program's
    own line, as it is without the guard.
    """

    __slots__ = ("_audience", "_bind", "_finished", "_original")

    def __init__(self, original: Any, audience: _Audience) -> None:
        self._original = original
        self._bind = original.__get__
        self._audience = audience
        # The C finalizer does nothing for a closed socket, so it need not be bound for one.
        self._finished = _do_nothing if original is _socket.socket.__del__ else None  # type: ignore[attr-defined]

    def __get__(self, sock: socket.socket | None, owner: type | None = None) -> Any:
        if sock is None:
            return self._original
        fd = _fileno(sock)
        if fd < 0:
            return self._finished or self._bind(sock, owner)
        for listener in self._audience.listeners:
            try:
                listener.dying(sock, fd)
            except Exception:
                listener.failed()
        return self._bind(sock, owner)


_fileno = _socket.socket.fileno
_do_nothing: Callable[[], Any] = [].copy
_INIT_CODE = SOCKET.__init__.__code__

_METHODS = (
    _Method("__init__", _wrap_init),
    _Method("detach", _wrap_detach),
    _Method("makefile", _wrap_makefile),
    _Method("__del__", _Finalizer),
)
