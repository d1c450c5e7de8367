"""What every framework needs: a monitor for the life of the application, and labels of requests.

Nothing that goes wrong here reaches the application: it is served without.
"""

from __future__ import annotations

import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from contextvars import Token
from functools import partial
from typing import TYPE_CHECKING, Any

from closewait_guard import _api
from closewait_guard._capture import LABELS
from closewait_guard._config import interval as parse_interval
from closewait_guard._config import require_number, shown
from closewait_guard._cpython import running_loop
from closewait_guard._signal import restore_default
from closewait_guard._threads import allows_daemons, in_child
from closewait_guard.exceptions import ConfigurationError

if TYPE_CHECKING:
    from closewait_guard._guard import Guard
    from closewait_guard._monitor import Monitor
    from closewait_guard.integrations._page import StatusPage
    from closewait_guard.model import Reporter
    from closewait_guard.settings import Settings

__all__ = [
    "NO_ROUTE",
    "AppMonitor",
    "Before",
    "RequestLabel",
    "WatchedApp",
    "off_loop",
    "require_application",
    "warn_of_failure",
    "without_numbers",
]


# What ends a label.
Before = Token[tuple[object, ...]]


class AppMonitor:
    """Keeps a monitor running in each process in which an application is served.

    All applications of a process share one. A monitor that the program has started itself is used
    in its place, as is that of `run` where no reporters are given.

    Args:
        interval: Seconds between two reports; `Settings.interval` when left out.
        settings: As for `install()`, like the overrides.
        reporters: As for `watch()`.
        at_exit: Report once more when the last application ends; `Settings.at_exit` when left out.
        **overrides: Single settings that win over all other sources.

    Raises:
        ConfigurationError: A setting cannot be used, or the guard is installed with others.
    """

    def __init__(
        self,
        interval: float | None = None,
        *,
        settings: Settings | None = None,
        reporters: Iterable[Reporter | str] = (),
        at_exit: bool | None = None,
        **overrides: object,
    ) -> None:
        self.is_started = False
        if interval is not None:
            # The monitor would refuse it with the first request.
            require_number(parse_interval, interval, "interval")
        self._options: dict[str, Any] = {"interval": interval, "at_exit": at_exit}
        self._settings: dict[str, Any] = {"settings": settings, **overrides}
        self._reporters = _callables(reporters)
        # At once: what the application opens before it is served has its line, too.
        _api.install(**self._settings)
        _all.add(self)

    def start(self) -> None:
        """Watch this process from now on. Idempotent; a failure is a warning."""
        if self.is_started:
            return
        with _lock:
            # Not again with the next request, if it fails.
            self.is_started = True
            _served.add(self)
            try:
                self._watch()
            except Exception as error:
                warn_of_failure(f"the application is served without a monitor: {error}")

    def _watch(self) -> None:
        global _monitor
        _remove_reporters(each for each in _added if each() is None)
        if _monitor is not None and _monitor.running:
            self._take_part(_monitor.guard)
        elif not _api.is_watched(by_program=bool(self._reporters)):
            guard = _api.install(**self._settings)
            _monitor = _api.watch(reporters=self._new_to(guard), **self._options, **self._settings)
        elif self._reporters:
            warn_of_failure(
                "the program has a monitor: the reporters of the application get no reports"
            )

    def _take_part(self, guard: Guard) -> None:
        if reporters := self._new_to(guard):
            guard._add_reporters(reporters)

    def _new_to(self, guard: Guard) -> tuple[Reporter, ...]:
        """The reporters, unless the guard has them since the application began before."""
        known = _added.get(weakref.ref(self))
        if known is not None and known[0] is guard:
            return ()
        _added[weakref.ref(self)] = guard, self._reporters
        return self._reporters

    def stop(self) -> None:
        """The application ends, and with the last one of a process the monitor. Idempotent."""
        global _monitor
        with _lock:
            _served.discard(self)
            self.is_started = False
            if _served or _monitor is None:
                return
            monitor, _monitor = _monitor, None
            # An application that begins meanwhile waits for the end of it.
            with suppress(Exception):
                if monitor.guard._leaves_last_report:
                    monitor.stop()
                else:
                    monitor.__exit__(None, None, None)
            _remove_reporters(_added)

    async def stop_off_loop(self) -> None:
        """The same from an event loop, which goes on meanwhile."""
        await off_loop(self.stop)
        # In the main thread, where the loop usually runs.
        restore_default()


_lock = threading.Lock()
_all: weakref.WeakSet[AppMonitor] = weakref.WeakSet()
# Those that are served in this process, and the monitor that was started for them. Tests make an
# application for each test, and where they do not end them, these are served until collected.
_served: weakref.WeakSet[AppMonitor] = weakref.WeakSet()
_monitor: Monitor | None = None
# The reporters that a guard has from each: as long as the monitor runs, and the application lives.
_added: dict[weakref.ref[AppMonitor], tuple[Guard, tuple[Reporter, ...]]] = {}


def _remove_reporters(applications: Iterable[weakref.ref[AppMonitor]]) -> None:
    for each in list(applications):
        guard, reporters = _added.pop(each)
        if guard._delivery is not None:
            guard._delivery.remove(reporters)


@in_child
def _after_fork() -> None:
    """A worker has no thread of its parent: it starts a monitor of its own when it serves."""
    global _lock, _monitor
    _lock, _monitor = threading.Lock(), None
    _served.clear()
    for each in list(_all):
        each.is_started = False


def _callables(reporters: Iterable[Reporter | str]) -> tuple[Reporter, ...]:
    """The reporters that are meant: a name that stands for none is refused before a fork."""
    if not reporters:
        return ()
    from closewait_guard._delivery import Delivery

    return Delivery(reporters).reporters


def require_application(app: object, call: str) -> None:
    """Refuse at once what its server could not call.

    Raises:
        ConfigurationError: It is no callable.
    """
    if not callable(app):
        raise ConfigurationError(f"{call}(): expected an application to call, got {shown(app)}")


def warn_of_failure(text: str) -> None:
    """Warn of what went wrong for the guard, and not for the application."""
    # Where warnings are errors, the program continues all the same.
    with suppress(Exception):
        warnings.warn(f"closewait_guard: {text}", RuntimeWarning, stacklevel=3)


class WatchedApp:
    """Stands in the place of an application: it has its attributes, and sets them there."""

    app: Callable[..., Any]
    # With the application: each attribute of what has `__getattr__` takes long to look up.
    _closewait_parts: tuple[Callable[..., Any], AppMonitor, StatusPage]

    def __init__(self, app: Callable[..., Any], monitor: AppMonitor, page: StatusPage) -> None:
        self.__dict__.update({"app": app, "_closewait_parts": (app, monitor, page)})

    def __getattr__(self, name: str) -> Any:
        if name == "app":  # A copy has no attributes yet.
            raise AttributeError(name)
        return getattr(self.app, name)

    def __setattr__(self, name: str, value: object) -> None:
        # Such as `app.dependency_overrides = {}` in tests.
        setattr(self.app, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.app, name)


async def off_loop(function: Callable[..., Any], *arguments: object) -> Any:
    """Call what may take a moment in another thread, where the event loop is asyncio's.

    One of its own: those of the loop may all be busy, or gone, just when the application ends or
    somebody wants to know what is wrong with it.
    """
    loop = running_loop()
    if loop is None:
        return function(*arguments)
    future = loop.create_future()

    def call() -> None:
        try:
            done = partial(end_future, future.set_result, function(*arguments))
        except Exception as error:
            done = partial(end_future, future.set_exception, error)
        # The loop may be closed.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(done)

    def end_future(end: Callable[[Any], None], value: object) -> None:
        # It may be cancelled.
        if not future.done():
            end(value)

    thread = threading.Thread(target=call, name="closewait-guard-call", daemon=allows_daemons())
    try:
        thread.start()
    except RuntimeError:
        # There are too many.
        return function(*arguments)
    try:
        return await future
    finally:
        if future.done() and not future.cancelled():
            # It has nothing left to do, and no test is to see it.
            thread.join()


class RequestLabel:
    """A label for the time of one request: its method, and its route once that is known.

    It has its text when it is read, because an application finds the route in the middle of the
    request; after the request it keeps only what that needs. In tasks and threads that the request
    has started it lasts as long as they do. A request that is served in the context of an earlier
    one, as on the same connection, has its own label only.

    Every request has one, and few are read: it is made without arguments, and each framework has a
    subclass, because that is the fastest.

    Example:
        >>> class Label(RequestLabel):
        ...     def _keep(self, request):
        ...         return f"GET {request['route']}"
        >>> label = Label()
        >>> before = label.enter({"route": "/a/{id}"})
        >>> [str(each) for each in LABELS.get()]
        ['GET /a/{id}']
        >>> label.leave(before)
        >>> label.end()
    """

    __slots__ = ("_kept", "_request")

    def enter(self, request: Any) -> Before:
        """Label what is opened from now on in this context."""
        self._request = request
        self._kept: object = None
        labels = LABELS.get()
        return LABELS.set((*_without_requests(labels), self) if labels else (self,))

    def resume(self) -> Before:
        """Label it again, after `leave()`: in the middle of a request, or when it has ended."""
        labels = LABELS.get()
        return LABELS.set((*_without_requests(labels), self) if labels else (self,))

    @staticmethod
    def leave(before: Before) -> None:
        """Undo that. A coroutine that is collected ends in another context, which has no label."""
        try:  # noqa: SIM105 - suppress() takes as long as all the rest
            LABELS.reset(before)
        except ValueError:
            pass

    def end(self) -> None:
        """The request is over, or what its text is made from may not last. Idempotent."""
        if self._kept is None:
            try:
                self._kept = self._keep(self._request)
            except Exception:
                # What it is made from belongs to the application.
                self._kept = _UNKNOWN
            self._request = None

    def __str__(self) -> str:
        kept = self._kept
        try:
            text = self._text_of(self._keep(self._request) if kept is None else kept)
        except Exception:
            # As above, or it has ended in another thread meanwhile.
            text = _UNKNOWN if self._kept is None else self._text_of(self._kept)
        return text[:_MAX_LABEL]

    def _text_of(self, kept: Any) -> str:
        return _UNKNOWN if kept is _UNKNOWN else self._describe(kept)

    def _keep(self, request: Any) -> object:
        """What the text is made from, as far as it is known."""
        raise NotImplementedError

    def _describe(self, kept: Any) -> str:
        """The text, from that."""
        return str(kept)


def _without_requests(labels: Iterable[object]) -> Iterator[object]:
    return (each for each in labels if not isinstance(each, RequestLabel))


_UNKNOWN = "request"
_MAX_LABEL = 120
# In the place of a route where the application has found none: it answers 404.
NO_ROUTE = "(no route)"


def without_numbers(path: str) -> str:
    """A path without what is in it of a customer: for applications of which no route is known.

    Example:
        >>> without_numbers("/items/42/parts/9f86d081-884c"), without_numbers("/items/new")
        ('/items/{}/parts/{}', '/items/new')
    """
    return _NUMBERS.sub("{}", path)


_NUMBERS = re.compile(r"(?<=/)(?:\d+|(?=[^/]*\d)[0-9A-Fa-f-]{8,}|[^/]{33,})(?=/|$)")
