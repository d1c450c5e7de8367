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

from closewait_guard._clock import nap, now
from closewait_guard._guard import Guard
from closewait_guard._remote.wire import RemoteError
from closewait_guard._render import to_dict
from closewait_guard._threads import in_child
from closewait_guard.settings import Settings

__all__ = ["obey"]


# A caller that was killed cannot say that the time is over.
_MAX_SECONDS_LATE = 1.0
_PAUSE = 0.1
_PACKAGE = "closewait_guard"
_API = f"{_PACKAGE}._api"
# The guard that `attach --install` has left here, and whether the package was loaded for it.
_installed: tuple[Guard, bool] | None = None


def obey(
    order: Mapping[str, Any], say: Callable[[Mapping[str, object]], None], leave: Callable[[], None]
) -> dict[str, object]:
    """Do what the caller wants, and return the last message to it.

    Args:
        order: `what` it wants, with the `settings` of a guard; of a watch, the `seconds` and the
            path of the file that is there `while` it goes on; of an installation, the `reporters`.
            Whether this runs in a thread of its own (`has_thread`), and whether the package was
            loaded for it (`is_visit`).
        say: Sends a message before that.
        leave: Takes the package out again, unless the program uses it.
    """
    what = order["what"]
    if what != "scan" and not order["has_thread"]:
        raise RemoteError("no thread can be started in it that does not keep others waiting")
    if what == "scan":
        return _scan(order)
    if what == "watch":
        return _watch(order, say, leave)
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


def _watch(
    order: Mapping[str, Any], say: Callable[[Mapping[str, object]], None], leave: Callable[[], None]
) -> dict[str, object]:
    own = _guard_of_program()
    if own is not None:
        say(_look(own) | {"had_guard": True})
        _wait(order["while"], order["seconds"])
        return _look(own)
    guard = Guard(Settings(**order["settings"]))
    with _not_in_children(guard, order, leave):
        try:
            guard.install()
            say(_look(guard))
            _wait(order["while"], order["seconds"])
            return _look(guard)
        finally:
            guard.uninstall()


@contextmanager
def _not_in_children(
    guard: Guard, order: Mapping[str, Any], leave: Callable[[], None]
) -> Iterator[None]:
    """In what the process forks meanwhile, no thread would take the guard out: it goes at once."""

    def end() -> None:
        with suppress(Exception):
            guard.uninstall()
            if order["is_visit"]:
                leave()

    in_child(end)
    yield


def _wait(path: str, seconds: float) -> None:
    """Wait until the caller has removed the file; a little longer than it should take, at most."""
    end = now() + seconds + _MAX_SECONDS_LATE
    while now() < end and os.path.exists(path):  # noqa: PTH110 - pathlib is slow to load
        nap(_PAUSE)


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
