"""Until a run needs more, it pays for next to nothing.

A hook on the first socket loads the recorder; a plugin only notes which test runs until the first
socket or thread.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, ModuleType, NoneType
from typing import Any

import pytest

from closewait_guard._capture import SOCKET, as_function
from closewait_guard.pytest_plugin._attribution import (
    add_thread_start_callback,
    remove_thread_start_callback,
)

__all__ = [
    "TEARDOWN",
    "FirstSocketHook",
    "IdlePlugin",
    "note_variables",
]


# How long a socket of another thread waits for what records it to be loaded: that thread may be
# importing what is loaded.
_MAX_SECONDS_TO_LOAD = 5.0
# What opens sockets in C, for which no socket object is made, and what imports that: a module whose
# import is under way when recording begins has no classes to be recorded yet.
_NATIVE_DRIVERS = ("psycopg", "psycopg2", "psycopg_pool")


class FirstSocketHook:
    """Calls `load` and `begin` before the next socket is made, and is gone between them.

    Sockets of other threads wait meanwhile. What is raised stays here, and so does the hook: the
    next socket is another try. The import of a driver whose sockets are made in C counts as one.
    """

    def __init__(self, load: Callable[[], object], begin: Callable[[], object]) -> None:
        self._load = load
        self._begin = begin
        self._lock = threading.RLock()
        self._is_loading = False
        self._is_installed = False
        self._ours: Any = None
        self._found: Any = None

    def install(self) -> None:
        """Wait for a socket from now on."""
        self._is_installed = True
        self._found = vars(SOCKET)["__init__"]
        self._ours = SOCKET.__init__ = _wrap_init(self._found, self._load_and_begin)
        sys.meta_path.insert(0, self)
        if any(name in sys.modules for name in _NATIVE_DRIVERS):
            self._load_and_begin()

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Called by the interpreter for every module that is imported; it is found by others."""
        if name not in _NATIVE_DRIVERS:
            return None
        before = set(map(id, sys.meta_path))
        self._load_and_begin()
        # From Python 3.14 on, for this import it asks only those that were there when it began.
        new = [finder for finder in sys.meta_path if id(finder) not in before]
        specs = (finder.find_spec(name, path, target) for finder in new)
        return next((spec for spec in specs if spec is not None), None)

    def remove(self) -> None:
        """Wait no more. Below a patch of another library the hook stays, and does nothing."""
        self._is_installed = False
        # By identity: others may compare as they like.
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        if self._is_on_top():
            SOCKET.__init__ = self._found

    def _is_on_top(self) -> bool:
        return vars(SOCKET)["__init__"] is self._ours

    def _load_and_begin(self) -> Any:
        """Do so, once; what is to make the socket instead of what was found, if anything.

        A patch above the hook has called what it found already, which must not be called twice.
        """
        was_on_top = self._is_on_top()
        if not self._lock.acquire(timeout=_MAX_SECONDS_TO_LOAD):
            return None
        try:
            if self._is_loading:
                # What is loaded makes a socket.
                return None
            # Else another thread has done it meanwhile.
            if self._is_installed:
                self._try_to_load(on_top=was_on_top)
            return SOCKET.__init__ if was_on_top and not self._is_installed else None
        finally:
            self._lock.release()

    def _try_to_load(self, *, on_top: bool) -> None:
        self._is_loading = True
        try:
            self._load()
            self.remove()
            self._begin()
        except BaseException as error:
            self._reinstall(on_top=on_top)
            # Imports can fail in the middle of a test that mocks the file system. What stops a
            # test, such as its timeout, must stop it here too.
            if not isinstance(error, Exception):
                raise
        finally:
            self._is_loading = False

    def _reinstall(self, *, on_top: bool) -> None:
        self._is_installed = True
        if on_top and vars(SOCKET)["__init__"] is self._found:
            SOCKET.__init__ = self._ours


def _wrap_init(found: Any, load_and_begin: Callable[[], Any]) -> Any:
    original = as_function(found)

    # Its name makes the guard look for the socket's caller further out.
    @functools.wraps(found)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        (load_and_begin() or original)(self, *args, **kwargs)

    return __init__


TEARDOWN = "pytest_runtest_teardown"
_PHASES = ("pytest_runtest_setup", "pytest_runtest_call", TEARDOWN)


class IdlePlugin:
    """Notes which test runs, and nothing else: more hooks slow a suite of short tests.

    Args:
        wake: Called before the first thread is started; it must call `end`.
    """

    def __init__(self, config: pytest.Config, wake: Callable[[], None]) -> None:
        self._plugins = config.pluginmanager
        self._wake = wake
        self.item: pytest.Item | None = None
        self._test_thread = threading.get_ident()
        self._plugins.register(self, "closewait_guard_idle")
        add_thread_start_callback(self._before_thread)

    def end(self) -> None:
        """Leave everything as it was found."""
        remove_thread_start_callback(self._before_thread)
        self._plugins.unregister(self)

    def _before_thread(self, thread: threading.Thread) -> None:  # noqa: ARG002
        self._wake()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        self.item = item

    def find_phase(self) -> str | None:
        """The hook of pytest that runs the test at this moment, if one does."""
        from closewait_guard._live import running_frames, variable_of

        frame = running_frames().get(self._test_thread)
        while frame is not None:
            name = frame.f_code.co_name
            if name in _PHASES and variable_of(frame, "item") is self.item is not None:
                return name
            frame = frame.f_back
        return None


# By identity, the types of most variables, through which no pool of a library is reached.
_PLAIN = frozenset(
    id(each)
    for each in (
        *(NoneType, str, int, bool, float, bytes, dict, list, tuple, set, frozenset, type),
        *(FunctionType, BuiltinFunctionType, ModuleType),
    )
)
_STDLIB = str(getattr(os, "__file__", "")).removesuffix("os.py")


def note_variables() -> dict[str, dict[str, int]]:
    """By module and name, the identities of what is in global variables.

    Not of the standard library's. This cannot wait for the first socket: the test that opens it may
    have stored its client by then.
    """
    found: dict[str, dict[str, int]] = {}
    for name, module in sys.modules.copy().items():
        variables = module.__dict__.copy() if type(module) is ModuleType else {}
        filename = variables.get("__file__")
        if type(filename) is not str:
            continue
        if "-packages" in filename:
            values = variables.items()
            found[name] = {key: id(value) for key, value in values if id(type(value)) not in _PLAIN}
        elif not filename.startswith(_STDLIB):
            found[name] = {key: id(value) for key, value in variables.items()}
    return found
