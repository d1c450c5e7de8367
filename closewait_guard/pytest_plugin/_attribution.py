"""Whose socket is it? The test or fixture in which it was opened, in its threads and tasks too."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from closewait_guard._enums import Scalar

__all__ = [
    "NOBODY",
    "OPENED_IN",
    "AnyioOwner",
    "Owner",
    "Ownership",
    "WiderFixture",
    "name_of",
    "record_thread_starts",
    "unwatch",
]


Watcher = Callable[[threading.Thread], None]

_watchers: list[Watcher] = []
_found = threading.Thread.start
_in_place = False


@functools.wraps(_found)
def _start(self: threading.Thread) -> None:
    for watcher in tuple(_watchers):
        watcher(self)
    _found(self)


def record_thread_starts(watcher: Watcher) -> None:
    """Tell `watcher` of every thread, in the thread that starts it, just before."""
    global _found, _in_place
    _watchers.append(watcher)
    # One that somebody has covered with a patch of his own is still there, beneath.
    if not _in_place:
        _found = threading.Thread.start
        threading.Thread.start = _start  # type: ignore[method-assign]
        _in_place = True


def unwatch(watcher: Watcher) -> None:
    """Stop telling. The last one to go takes the patch out, unless it is covered."""
    global _in_place
    _watchers.remove(watcher)
    if not _watchers and threading.Thread.start is _start:
        threading.Thread.start = _found  # type: ignore[method-assign]
        _in_place = False


# The name under which a birth's context tells its owner.
OPENED_IN = "opened_in"

Kept = dict[str, "Scalar"]


class Owner:
    """A test or a wider fixture.

    Attributes:
        name: What reports call it; no two owners of a run have the same.
        nodeid: The test, or where the fixture lives.
        mark: What was opened before is older than this mark of the guard's.
        over: It has been finished, and checked.
        kept: What each birth of its sockets keeps.
    """

    __slots__ = ("kept", "mark", "name", "nodeid", "over")

    def __init__(self, name: str, nodeid: str, mark: int) -> None:
        self.name = name
        self.nodeid = nodeid
        self.mark = mark
        self.over = False
        self.kept: Kept = {OPENED_IN: name}


# What pytest itself and its plugins do between tests.
NOBODY = Owner("", "", 0)


class Ownership:
    """Knows at every moment whose turn it is, in each thread and each task.

    A context variable carries the owner into tasks, callbacks and `asyncio.to_thread`. A thread
    without one belongs to whoever started it.
    """

    def __init__(self) -> None:
        self.present = NOBODY
        # Whose turn it is but for the fixtures that are inside it.
        self._base = NOBODY
        self._runner = 0
        self._owners: dict[str, Owner] = {}
        self._runs: dict[str, int] = {}
        # Of those forgotten whose name is another.
        self._nodeids: dict[str, str] = {}
        # What a birth keeps, not the owner: it is asked for at every birth.
        self._of_context: ContextVar[Kept | None] = ContextVar("socket_owner", default=None)
        self.in_context = self._of_context.get
        self._of_thread: weakref.WeakKeyDictionary[threading.Thread, Owner] = (
            weakref.WeakKeyDictionary()
        )

    def begin(self) -> None:
        """Take note of threads from now on."""
        self._runner = threading.get_ident()
        record_thread_starts(self._started)

    def end(self) -> None:
        """Leave everything as it was found."""
        unwatch(self._started)
        self._of_context.set(None)

    def new(self, name: str, nodeid: str, mark: int) -> Owner:
        """An owner; one that comes for the second time is told from the first."""
        run = self._runs[name] = self._runs.get(name, 0) + 1
        if run > 1:
            return self.new(f"{name} (run {run})", nodeid, mark)
        owner = self._owners[name] = Owner(name, nodeid, mark)
        return owner

    def turn_of(self, owner: Owner) -> None:
        """From now on, what happens in this thread is the owner's."""
        self._base = self.present = owner
        self._of_context.set(owner.kept)

    def take_over(self, owner: Owner) -> None:
        """A turn that nobody had noted has been this owner's; a fixture may be inside it."""
        if self.present is self._base:
            self.present = owner
            if threading.get_ident() == self._runner:
                self._of_context.set(owner.kept)
        self._base = owner

    @contextmanager
    def turn(self, owner: Owner) -> Iterator[None]:
        """The owner's turn is inside somebody else's."""
        before, of_context = self.present, self._of_context.get()
        is_outermost = before is self._base
        self.present = owner
        self._of_context.set(owner.kept)
        try:
            yield
        finally:
            self.present = self._base if is_outermost else before
            is_unset = of_context is None and self.present is not NOBODY
            self._of_context.set(self.present.kept if is_unset else of_context)

    def in_thread(self) -> Kept:
        """What a birth keeps where no context variable tells."""
        return self._by_thread().kept

    def called(self, name: object) -> Owner:
        """The owner of that name, as a birth has kept it."""
        found = self._owners.get(str(name))
        if found is None and isinstance(name, str) and name:
            # A thread or a task of a test has outlived it.
            found = self._owners[name] = Owner(name, self._nodeids.get(name, name), 0)
            found.over = True
        return found or NOBODY

    def forget(self, owner: Owner) -> None:
        """Keep no more than where a test was that is over and has left nothing: a run has many."""
        self._owners.pop(owner.name, None)
        if owner.name != owner.nodeid:
            self._nodeids[owner.name] = owner.nodeid

    def _started(self, thread: threading.Thread) -> None:
        kept = self.in_context()
        self._of_thread[thread] = self.called(kept[OPENED_IN]) if kept else self._by_thread()

    def _by_thread(self) -> Owner:
        thread = _active.get(threading.get_ident())
        owner = self._of_thread.get(thread) if thread is not None else None
        if owner is None or (owner.over and _works_for_all(thread)):
            return self.present
        return owner


def _works_for_all(thread: object) -> bool:
    """A worker of an executor serves whoever submits, not who happened to be the first."""
    target = getattr(thread, "_target", None)
    return getattr(target, "__module__", None) == "concurrent.futures.thread"


# Not threading.current_thread(), which registers a dummy for every foreign thread that asks.
_active: dict[int, Any] = threading._active  # type: ignore[attr-defined]


class AnyioOwner:
    """Takes the owner into the task of anyio's test runner, which was made in another's turn."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Generator[None, object, object]:
        if "anyio_backend" not in pyfuncitem.fixturenames:
            return (yield)
        if not inspect.iscoroutinefunction(pyfuncitem.obj):
            return (yield)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pyfuncitem, "obj", self._carrying(pyfuncitem.obj))
            return (yield)

    def _carrying(
        self, function: Callable[..., Coroutine[Any, Any, Any]]
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        owner = self._ownership.present

        @functools.wraps(function)
        async def carried(*arguments: Any, **named: Any) -> Any:
            with self._ownership.turn(owner):
                return await function(*arguments, **named)

        return carried


_SCOPES = ("session", "package", "module", "class")
# How pytest calls the fixtures that it makes of the older ways to set up.
_SET_UPS = {
    "unittest_setUpClass_fixture": "setUpClass",
    "xunit_setup_class_fixture": "setup_class",
    "xunit_setup_module_fixture": "setup_module",
}


def name_of(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> str:
    """What people call this fixture, where it lives, and its parameter."""
    place = f" of {request.node.nodeid}" if request.node.nodeid not in ("", ".") else ""
    for prefix, name in _SET_UPS.items():
        if fixturedef.argname.lstrip("_").startswith(prefix):
            return f"{name}{place}"
    parameter = getattr(request, "param", None)
    shown = f"[{parameter!r:.40}]" if parameter is not None else ""
    return f"{fixturedef.scope} fixture {fixturedef.argname!r}{shown}{place}"


class WiderFixture:
    """A fixture that outlives a test.

    It keeps its value, its unfinished generator, and what its set-up has assigned to the class or
    the module.
    """

    def __init__(
        self, owner: Owner, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> None:
        self.owner = owner
        self.rank = _SCOPES.index(fixturedef.scope)
        self._fixturedef = fixturedef
        self._places = [
            place
            for place in (
                request.cls if fixturedef.scope == "class" else None,
                request.module if fixturedef.scope == "module" else None,
            )
            if place is not None
        ]
        self._before = [{name: id(value) for name, value in vars(p).items()} for p in self._places]
        self._assigned: list[tuple[Any, str]] = []

    def set_up(self) -> None:
        """Note what the set-up has assigned."""
        for place, before in zip(self._places, self._before, strict=True):
            for name, value in vars(place).items():
                if before.get(name) != id(value):
                    self._assigned.append((place, name))

    def roots(self) -> Iterator[object]:
        """Where to look for what it keeps."""
        yield getattr(self._fixturedef, "cached_result", None)
        yield list(getattr(self._fixturedef, "_finalizers", ()))
        for place, name in self._assigned:
            yield vars(place).get(name)

    def failures(self) -> list[BaseException]:
        """The exception that its set-up raised, if it did."""
        result = getattr(self._fixturedef, "cached_result", None)
        error = result[2] if result is not None else None
        error = error[0] if isinstance(error, tuple) else error
        return [error] if isinstance(error, BaseException) else []
