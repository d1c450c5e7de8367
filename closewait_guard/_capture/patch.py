"""Install and remove the wrappers of classes of sockets; subscribe to what happens to sockets.

All guards of a process share one patch. It goes on with the first subscriber and off with the last.
"""

from __future__ import annotations

import _socket
import contextlib
import functools
import itertools
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from closewait_guard._capture.hooks import (
    SOCKET,
    WRAPPERS,
    WRAPPERS_OF_OTHERS,
    SocketEvents,
    Subscribers,
    as_function,
    listener_in_accept_by_thread,
    wrap_close,
)
from closewait_guard._cpython import close_in_collections_by

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from closewait_guard._capture.owner_hooks import OwnerEvents

__all__ = [
    "CallOnImport",
    "after_fork",
    "install_lock",
    "is_patched",
    "overriding_module",
    "patch_class",
    "patch_methods",
    "patched_classes",
    "replacement_class",
    "subscribe",
    "subscribe_owners",
    "try_unsubscribe",
    "unsubscribe",
    "unsubscribe_owners",
    "wrap_callable",
]


# Seconds.
_MAX_WAIT = 1.0

_subscribers: list[SocketEvents] = []
_owner_subscribers: list[OwnerEvents] = []
_lock = threading.RLock()


def install_lock() -> threading.RLock:
    """The one lock of installing and uninstalling. Nothing that happens to a socket takes it."""
    return _lock


def after_fork() -> None:
    """In the child: a lock that another thread held at the fork would never be released.

    Nor would the listening sockets be released that other threads were accepting from.
    """
    global _lock
    _lock = threading.RLock()
    listener_in_accept_by_thread.clear()


def subscribe(subscriber: SocketEvents, *, speedups: bool = True) -> None:
    """Call `subscriber` for what happens to sockets from now on.

    Args:
        subscriber: What to call.
        speedups: Whether the wrappers may be in C, if this subscriber is the first.
    """
    with install_lock():
        if subscriber not in _subscribers:
            _subscribers.append(subscriber)
        _update_methods(speedups=speedups)


def unsubscribe(subscriber: SocketEvents) -> None:
    """Stop calling `subscriber`; the last one to go leaves the class as it was found."""
    with install_lock():
        if subscriber in _subscribers:
            _subscribers.remove(subscriber)
        _update_methods()


def try_unsubscribe(subscriber: SocketEvents) -> None:
    """The same from within a call of the patch, where nothing may be waited for.

    While another thread is installing, nothing is done: call it again the next time.
    """
    lock = install_lock()
    if lock.acquire(blocking=False):
        try:
            unsubscribe(subscriber)
        finally:
            lock.release()


def patch_class(cls: type, module: str, *, speedups: bool = True) -> None:
    """Call the subscribers also for the sockets of a library's own class, from now on.

    Args:
        cls: It derives from that in C.
        module: Has the class that programs see in its place.
        speedups: Whether the wrappers may be in C.
    """
    # Called in the middle of an import, for whose end the thread that has the lock may wait.
    lock = install_lock()
    if not lock.acquire(timeout=_MAX_WAIT):
        return
    try:
        if not any(known is cls for known in patched_classes()):
            _methods.extend(_Method(cls, *each) for each in WRAPPERS_OF_OTHERS.items())
            _replacing_modules.add(module)
            _update_methods(speedups=speedups)
    finally:
        lock.release()


def subscribe_owners(subscriber: OwnerEvents) -> None:
    """Call `subscriber` for what happens to owners from now on."""
    with install_lock():
        if subscriber not in _owner_subscribers:
            _owner_subscribers.append(subscriber)
            _update_methods_of_owners(_owner_methods)


def unsubscribe_owners(subscriber: OwnerEvents) -> None:
    """Stop calling `subscriber`; the last one to go leaves the classes as they were found."""
    with install_lock():
        if subscriber in _owner_subscribers:
            _owner_subscribers.remove(subscriber)
        _update_methods_of_owners(_owner_methods)
        # Those that cannot be taken out are needed for the next that subscribes.
        _owner_methods[:] = [method for method in _owner_methods if method.is_wrapped]


def patch_methods(
    cls: type, wrappers: Mapping[str, Callable[[Any, Any], Any]], *, speedups: bool
) -> None:
    """Call the subscribers for owners through wrappers of a class's methods, from now on.

    Args:
        cls: The class.
        wrappers: What makes each, by the name of the method.
        speedups: Whether they may be in C.
    """
    from closewait_guard._capture.owner_hooks import OwnerSubscribers

    # Called in the middle of an import, for whose end the thread that has the lock may wait.
    lock = install_lock()
    if not lock.acquire(timeout=_MAX_WAIT):
        return
    try:
        known = {method.name for method in _owner_methods if method.cls is cls}
        added = [
            _Method(cls, name, wrap, OwnerSubscribers)
            for name, wrap in wrappers.items()
            if name not in known
        ]
        _owner_methods.extend(added)
        _update_methods_of_owners(added, speedups=speedups)
    finally:
        lock.release()


def _update_methods_of_owners(methods: Iterable[_Method], *, speedups: bool = False) -> None:
    for method in methods:
        method.set_subscribers(tuple(_owner_subscribers), speedups=speedups)


def patched_classes() -> list[type]:
    """The socket class, and those of libraries that take its place."""
    return list({id(method.cls): method.cls for method in _methods}.values())


def _update_methods(*, speedups: bool = False) -> None:
    for method in _methods:
        method.set_subscribers(tuple(_subscribers), speedups=speedups)
    _collections.set_subscribers(tuple(_subscribers))


def is_patched() -> bool:
    """Whether a wrapper of ours is on a class, even one that calls no subscriber."""
    return any(method.top() is not None for method in (*_methods, *_owner_methods))


def overriding_module() -> str | None:
    """The module that has put a wrapper over ours, if one has."""
    for method in _methods:
        if method.is_covered():
            return str(getattr(method.present, "__module__", None) or type(method.present))
    return None


def replacement_class(known: Iterable[str] = ()) -> str | None:
    """What the name `socket.socket` stands for now, if it is no longer the class that we watch.

    Args:
        known: Classes, as `module:name`, whose sockets are found without a patch.
    """
    if socket.socket is SOCKET:
        return None
    module = getattr(socket.socket, "__module__", None) or type(socket.socket).__module__
    if module in _replacing_modules or module in {name.partition(":")[0] for name in known}:
        return None
    return f"{module}.{getattr(socket.socket, '__qualname__', 'socket')}"


def wrap_callable(place: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Wrap a callable of a module or class; returns what takes the wrapper out again.

    Args:
        place: Where the callable is an attribute.
        name: Its name there.
        around: Called with the callable, what it is bound to, and its arguments.
    """
    import wrapt

    if not callable(getattr(place, name)):
        raise TypeError("it cannot be called")
    was_own, found = name in vars(place), vars(place).get(name)
    wrapt.wrap_function_wrapper(place, name, around)
    ours = vars(place)[name]

    def restore() -> None:
        if vars(place).get(name) is not ours:
            return
        if was_own:
            setattr(place, name, found)
        else:
            delattr(place, name)

    return restore


class CallOnImport:
    """Waits for the import of what is to be wrapped.

    It stands first among the finders of modules, until all are imported or `remove` is called; each
    module is found and loaded by what finds it without us.

    Args:
        call: Called with the name of each when its module has been imported.
        names: What to wait for.
        module_of: The module of a name; of `module:name`, that before the colon.
    """

    def __init__(
        self,
        call: Callable[[str], object],
        names: Iterable[str],
        module_of: Callable[[str], str] = lambda name: name.partition(":")[0],
    ) -> None:
        self._call = call
        self._awaited: dict[str, list[str]] = {}
        for name in names:
            self._awaited.setdefault(module_of(name), []).append(name)

    def install(self) -> Self:
        """Wait from now on; for what is imported already, call at once."""
        sys.meta_path.insert(0, self)
        for name in self._awaited.keys() & sys.modules.keys():
            self._imported(name)
        return self

    def remove(self) -> None:
        """Wait no more. Idempotent."""
        self._awaited.clear()
        # By identity: others may compare as they like.
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Called by the interpreter for every module that is imported for the first time."""
        if name not in self._awaited:
            return None
        # Those before it have been asked, and may wait for the same module.
        finders = itertools.dropwhile(lambda each: each is not self, list(sys.meta_path))
        for finder in itertools.islice(finders, 1, None):
            # As the interpreter does, which passes over what has no such method.
            find = getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                self._watch_loading(name, spec.loader)
                return spec  # type: ignore[no-any-return]
        return None

    def _watch_loading(self, name: str, loader: Any) -> None:
        # Some loaders have no room for it: then nothing is attributed.
        with contextlib.suppress(Exception):
            shadow = vars(loader).get("exec_module")
            if shadow is None:
                shadow = loader.exec_module = _Loading(loader)
            if type(shadow) is _Loading:
                shadow.calls.append(functools.partial(self._imported, name))

    def _imported(self, name: str) -> None:
        for each in self._awaited.pop(name, ()):
            with contextlib.suppress(Exception):
                self._call(each)
        if not self._awaited:
            self.remove()


class _Loading:
    """Shadows `exec_module` of one loader until it is called; all that wait for it share one."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.calls: list[Callable[[], object]] = []

    def __call__(self, module: object) -> None:
        del self._loader.exec_module
        self._loader.exec_module(module)
        for call in self.calls:
            call()


class InstalledWrapper:
    """One wrapper of ours, and what it was put over."""

    __slots__ = ("found", "ours", "subscribers", "was_own")

    def __init__(self, ours: Any, found: Any, subscribers: Any, *, was_own: bool) -> None:
        self.ours = ours
        self.found = found
        self.subscribers = subscribers
        self.was_own = was_own


class _Method:
    """One method of a class, patched in place and restored exactly.

    A wrapper that another library has wrapped cannot be taken out. It stays, without subscribers:
    as soon as it is on top again, it is used again, or removed.
    """

    def __init__(
        self,
        cls: type,
        name: str,
        wrap: Callable[[Any, Any], Any],
        make_subscribers: Callable[..., Any] = Subscribers,
    ) -> None:
        self.cls = cls
        self.name = name
        self._wrap = wrap
        self._make_subscribers = make_subscribers
        self._layers: list[InstalledWrapper] = []

    @property
    def present(self) -> Any:
        """What the class itself has there, not what it inherits."""
        return vars(self.cls).get(self.name)

    @property
    def is_wrapped(self) -> bool:
        """Whether a wrapper of ours is there, on top or below those of others."""
        return bool(self._layers)

    def top(self) -> InstalledWrapper | None:
        """Our wrapper, if it is what the class has there now."""
        return next((layer for layer in self._layers if layer.ours is self.present), None)

    def is_covered(self) -> bool:
        """Whether subscribers are called through the wrapper of another library, if at all."""
        return self.top() is None and any(layer.subscribers.current for layer in self._layers)

    def set_subscribers(self, subscribers: tuple[object, ...], *, speedups: bool) -> None:
        """Call these and no others; take our wrapper out if there are none."""
        layer = self._layer_in_use() or (self._add_layer(speedups) if subscribers else None)
        if layer is not None:
            layer.subscribers.replace(subscribers)
        if not subscribers:
            self._remove()

    def _layer_in_use(self) -> InstalledWrapper | None:
        """The one that has subscribers, else one without that is on top."""
        with_subscribers = (layer for layer in self._layers if layer.subscribers.current)
        return next(with_subscribers, None) or self.top()

    def _add_layer(self, speedups: bool) -> InstalledWrapper:
        # Not through wrapt, which brings asyncio and ssl into every program: 10 MB that most do
        # not need, for what is one assignment here.
        subscribers, found, was_own = (
            self._make_subscribers(speedups=speedups),
            self.present,
            self.name in vars(self.cls),
        )
        original = self._original()
        original = None if original is None else as_function(original)
        setattr(self.cls, self.name, self._wrap(original, subscribers))
        self._layers.append(InstalledWrapper(self.present, found, subscribers, was_own=was_own))
        return self._layers[-1]

    def _original(self) -> Any:
        """None for a finalizer where the class has none."""
        found = (vars(cls)[self.name] for cls in self.cls.__mro__ if self.name in vars(cls))
        return next(found, None)

    def _remove(self) -> None:
        while (layer := self.top()) is not None:
            if layer.was_own:
                setattr(self.cls, self.name, layer.found)
            else:
                # What was inherited was copied: it must not stay behind.
                delattr(self.cls, self.name)
            self._layers.remove(layer)


# Those of further classes stay here without subscribers, for the next that subscribes.
_replacing_modules = set[str]()
_methods = [_Method(SOCKET, *each) for each in WRAPPERS.items()]
_owner_methods: list[_Method] = []


class _Collections:
    """What closes sockets while the garbage collector runs, and only then."""

    def __init__(self) -> None:
        self._subscribers = Subscribers()
        self._restore: Callable[[], None] | None = None

    def set_subscribers(self, subscribers: tuple[SocketEvents, ...]) -> None:
        """Call these and no others; leave everything as it was found if there are none."""
        self._subscribers.replace(subscribers)
        if subscribers and self._restore is None:
            close = wrap_close(_socket.socket.close, self._subscribers)
            self._restore = close_in_collections_by(close, SOCKET)
        elif not subscribers and self._restore is not None:
            self._restore()
            self._restore = None


_collections = _Collections()
