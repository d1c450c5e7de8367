"""What `attach` has a process do, inside of it: look once, look again later, or keep a guard.

A guard that the program has already answers instead, and none is put in beside it. In all that
happens here the package may be one that is loaded for this visit only, from a folder that is gone
afterwards.
"""

from __future__ import annotations

import _thread
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import BuiltinFunctionType
from typing import Any

from closewait_guard._clock import now
from closewait_guard._guard import Guard
from closewait_guard._remote.thread import RepeatingThread
from closewait_guard._remote.wire import RemoteError
from closewait_guard._render import to_dict
from closewait_guard._threads import in_child
from closewait_guard.settings import Settings

__all__ = ["obey"]


_Message = Mapping[str, object]

# A caller that was killed cannot say that the time is over.
_MAX_SECONDS_LATE = 1.0
_PAUSE = 0.1
# For the thread that has nothing more to do when another goes on.
_SECONDS_UNTIL_GONE, _MAX_SECONDS_UNTIL_GONE = 0.01, 1.0
_PACKAGE = "closewait_guard"
_API = f"{_PACKAGE}._api"
# The guard that `attach --install` has left here, and whether the package was loaded for it.
_installed: tuple[Guard, bool] | None = None


def obey(
    order: Mapping[str, Any],
    say: Callable[[_Message], None],
    is_over: Callable[[Callable[[], _Message | None]], bool],
    leave: Callable[[], None],
) -> _Message | None:
    """Do what the caller wants, and return the last message to it; None if that comes later.

    Args:
        order: `what` it wants, with the `settings` of a guard; of a watch, the `seconds` and the
            path of the file that is there `while` it goes on; of an installation, the `reporters`.
            Whether this runs in a thread of its own (`has_thread`), and whether the package was
            loaded for it (`is_visit`).
        say: Sends a message before that.
        is_over: Calls a function in a thread of its own, sends what it returns as the last message,
            or what it raises, and returns whether it was one of those.
        leave: Takes the package out again, unless the program uses it.
    """
    what = order["what"]
    if what != "scan" and not order["has_thread"]:
        raise RemoteError("no thread can be started in it that does not keep others waiting")
    if what == "scan":
        return _scan(order)
    if what == "watch":
        watch = _Watch(order, say, leave)
        RepeatingThread(
            lambda: None if is_over(watch.go_on) else _PAUSE,
            _SECONDS_UNTIL_GONE,
            is_native=True,
            on_loss=watch.give_up,
        )
        return None
    return _install(order, leave) if what == "install" else _uninstall(leave)


def _guard_of_program() -> Guard | None:
    """The process-wide guard. What holds it is not loaded for that: a program does when it uses it.

    Then the package is the program's.
    """
    api = sys.modules.get(_API)
    guard: Guard | None = None if api is None else api.current_guard()
    return guard


def _scan(order: Mapping[str, Any]) -> dict[str, object]:
    if (own := _guard_of_program()) is not None:
        return _look(own)
    guard = Guard(Settings(**order["settings"]))
    try:
        return _look(guard)
    finally:
        guard.uninstall()


def _look(guard: Guard) -> dict[str, object]:
    return {"report": to_dict(guard.scan())}


class _Watch:
    """Look, and again when the time is over, in a thread that makes way for forks meanwhile."""

    def __init__(
        self, order: Mapping[str, Any], say: Callable[[_Message], None], leave: Callable[[], None]
    ) -> None:
        self._order, self._say, self._leave = order, say, leave
        self._former_thread = f"/proc/self/task/{_thread.get_native_id()}"
        self._until = now() + _MAX_SECONDS_UNTIL_GONE
        self._guard: Guard | None = None
        self._is_own = False

    def go_on(self) -> _Message | None:
        """Do what is to be done by now; the last message in the end."""
        try:
            message = self._next_message()
        except BaseException:
            self._take_out()
            raise
        if message is not None:
            self._take_out()
        return message

    def _next_message(self) -> _Message | None:
        path = self._former_thread if self._guard is None else self._order["while"]
        if now() < self._until and os.path.exists(path):  # noqa: PTH110 - pathlib is slow to load
            return None
        if self._guard is not None:
            return _look(self._guard)
        self._begin()
        return None

    def _begin(self) -> None:
        own = _guard_of_program()
        self._is_own = own is not None
        self._guard = own or Guard(Settings(**self._order["settings"]))
        _ends_in_children.add(self._take_out)
        if not self._is_own:
            self._guard.install()
        self._say(_look(self._guard) | ({"had_guard": True} if self._is_own else {}))
        self._until = now() + self._order["seconds"] + _MAX_SECONDS_LATE

    def _take_out(self) -> None:
        _ends_in_children.discard(self._take_out)
        try:
            if self._guard is not None and not self._is_own:
                self._guard.uninstall()
        finally:
            if self._order["is_visit"]:
                self._leave()

    def give_up(self) -> None:
        """Without a thread: take the guard out at once."""
        with suppress(Exception):
            self._take_out()
            self._say({"error": "after a fork no thread could be started in it"})


# What takes a guard out of a process that is forked meanwhile: no thread would do so there.
_ends_in_children = set[Callable[[], None]]()


@in_child
def _end_in_child() -> None:
    for end in list(_ends_in_children):
        with suppress(Exception):
            end()
    _ends_in_children.clear()


@contextmanager
def _not_in_children(
    guard: Guard, order: Mapping[str, Any], leave: Callable[[], None]
) -> Iterator[None]:
    def end() -> None:
        guard.uninstall()
        if order["is_visit"]:
            leave()

    _ends_in_children.add(end)
    try:
        yield
    finally:
        _ends_in_children.discard(end)


def _install(order: Mapping[str, Any], leave: Callable[[], None]) -> dict[str, object]:
    global _installed
    if _guard_of_program() is not None:
        return {"had_guard": True}
    if not isinstance(_thread.start_new_thread, BuiltinFunctionType):
        raise RemoteError(
            "its threads are green ones, of which none can be started from here: start it with "
            "closewait-guard run, or use --watch"
        )
    _load_all(_PACKAGE)
    guard = Guard(Settings(**order["settings"]), _reporters(order["reporters"]))
    with _not_in_children(guard, order, leave):
        try:
            guard.install()
            _have_it_answer(guard, reports=bool(order["reporters"]))
        except BaseException:
            guard.uninstall()
            raise
    # The program may install one of its own, with its own settings.
    import_module(_API).read_records_of(guard)
    _installed = guard, order["is_visit"]
    return {"had_guard": False}


def _have_it_answer(guard: Guard, *, reports: bool) -> None:
    from closewait_guard._monitor import Monitor
    from closewait_guard._remote.control import Control

    Control(guard).start()
    if reports:
        Monitor(guard, at_exit=False, in_children=True).start()


def _reporters(names: Sequence[str]) -> list[Any]:
    """Text goes to stderr itself, not to what the program puts in its place, such as a logger."""
    from closewait_guard.reporters import text

    return [text(sys.__stderr__) if name == "text" else name for name in names]


# What only others start, what needs packages that the program may lack, and what is loaded last.
_UNUSED = frozenset(
    f"{_PACKAGE}.{name}"
    for name in (
        *("__main__", "_api", "_preload", "commands", "integrations", "pytest_plugin", "testing"),
        *("_rich", "_processes.psutil"),
    )
)


def _load_all(name: str) -> None:
    """Load what may be needed later: by then its folder may be gone, or have another version."""
    for found in pkgutil.iter_modules(import_module(name).__path__, f"{name}."):
        if found.name in _UNUSED:
            continue
        with suppress(ImportError):
            import_module(found.name)
            if found.ispkg:
                _load_all(found.name)


def _uninstall(leave: Callable[[], None]) -> dict[str, object]:
    global _installed
    if _installed is None:
        raise RemoteError("it has no guard that `attach --install` has left there")
    (guard, is_visit), _installed = _installed, None
    api = sys.modules[_API]
    api.read_records_of(None)
    guard.uninstall()
    if is_visit and api.current_guard() is None:
        del sys.modules[_API]
        leave()
    return {"had_guard": True}
