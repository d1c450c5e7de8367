"""The owner of each socket: the test or fixture that opened it, in its threads and tasks too."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType
from typing import TYPE_CHECKING, Any

import pytest

from closewait_guard._cpython import THREAD_TARGET, threads

if TYPE_CHECKING:
    from closewait_guard._capture import Creation
    from closewait_guard._enums import Scalar

__all__ = [
    "NO_OWNER",
    "OPENED_IN",
    "AnyioOwner",
    "Owner",
    "Ownership",
    "WiderFixture",
    "add_thread_start_callback",
    "fixture_name",
    "opened_in",
    "remove_thread_start_callback",
]


StartCallback = Callable[[threading.Thread], None]

_callbacks: list[StartCallback] = []
_found = threading.Thread.start
_is_installed = False


@functools.wraps(_found)
def _start(self: threading.Thread) -> None:
    for callback in tuple(_callbacks):
        callback(self)
    _found(self)


def add_thread_start_callback(callback: StartCallback) -> None:
    """Call `callback` with every thread, in the thread that starts it, just before."""
    global _found, _is_installed
    _callbacks.append(callback)
    # Ours is still there below a patch that another library has put over it.
    if not _is_installed:
        _found = threading.Thread.start
        threading.Thread.start = _start  # type: ignore[method-assign]
        _is_installed = True


def remove_thread_start_callback(callback: StartCallback) -> None:
    """Stop calling it. The last one to go removes the patch, unless another lies over it."""
    global _is_installed
    _callbacks.remove(callback)
    if not _callbacks and threading.Thread.start is _start:
        threading.Thread.start = _found  # type: ignore[method-assign]
        _is_installed = False


# The key of the owner in what is recorded of a socket.
OPENED_IN = "opened_in"

CreationContext = dict[str, "Scalar"]

_SAME_DESCRIPTOR = frozenset({"wrapped", "detached", "inherited"})


def opened_in(creation: Creation) -> object:
    """The name of its owner; that of the descriptor, where it was wrapped later."""
    while creation.parent is not None and creation.origin in _SAME_DESCRIPTOR:
        creation = type(creation)._make(creation.parent)
    return creation.context.get(OPENED_IN)


class Owner:
    """A test or a wider fixture.

    Attributes:
        name: What reports call it; no two owners of a run have the same.
        nodeid: The test, or where the fixture lives.
        mark: What was opened before is older than this mark of the guard's.
        fixture: Of a wider fixture, its name alone.
        code: That of its function, where it was written as a fixture.
        last_test: Of a wider fixture, a test that used it: the last, as far as that is known.
        finished: It is over, and has been checked.
        creation_context: What is recorded with each of its sockets.
    """

    __slots__ = (
        "code",
        "creation_context",
        "finished",
        "fixture",
        "last_test",
        "mark",
        "name",
        "nodeid",
    )

    def __init__(self, name: str, nodeid: str, mark: int) -> None:
        self.name = name
        self.nodeid = nodeid
        self.mark = mark
        self.fixture = ""
        self.code: CodeType | None = None
        self.last_test: str | None = None
        self.finished = False
        self.creation_context: CreationContext = {OPENED_IN: name}


# What pytest itself and its plugins do between tests.
NO_OWNER = Owner("", "", 0)


class Ownership:
    """Knows the owner of what is opened at this moment, in each thread and each task.

    A context variable carries the owner into tasks, callbacks and `asyncio.to_thread`. A thread
    without one belongs to the owner that started it.
    """

    def __init__(self) -> None:
        self.current = NO_OWNER
        # The current owner, if no wider fixture were set up or finalized inside it.
        self._base = NO_OWNER
        self._test_thread = 0
        self._owners: dict[str, Owner] = {}
        self._runs: dict[str, int] = {}
        # Of forgotten owners whose name is not their node id.
        self._nodeids: dict[str, str] = {}
        # What is recorded, not the owner: it is read whenever a socket is made.
        self._context_variable: ContextVar[CreationContext | None] = ContextVar(
            "socket_owner", default=None
        )
        self.context_of_variable = self._context_variable.get
        self._owners_by_thread: weakref.WeakKeyDictionary[threading.Thread, Owner] = (
            weakref.WeakKeyDictionary()
        )

    def begin(self, *, within_test: bool) -> None:
        """Note the owners of threads from now on.

        Args:
            within_test: A test is under way, and may have started some of those that run. Else no
                test has: they have no owner, unless it is known.
        """
        self._test_thread = threading.get_ident()
        for number, thread in () if within_test else threads.copy().items():
            if number != self._test_thread:
                self._owners_by_thread.setdefault(thread, NO_OWNER)
        add_thread_start_callback(self._on_thread_start)

    def end(self) -> None:
        """Leave everything as it was found."""
        remove_thread_start_callback(self._on_thread_start)
        self._context_variable.set(None)

    def make_owner(self, name: str, nodeid: str, mark: int) -> Owner:
        """Make an owner; one that comes for the second time gets a name of its own."""
        run = self._runs[name] = self._runs.get(name, 0) + 1
        if run > 1:
            return self.make_owner(f"{name} (run {run})", nodeid, mark)
        owner = self._owners[name] = Owner(name, nodeid, mark)
        return owner

    def set_current(self, owner: Owner) -> None:
        """From now on, what is opened in this thread is the owner's."""
        self._base = self.current = owner
        self._context_variable.set(owner.creation_context)

    def reassign_current(self, owner: Owner) -> None:
        """The current owner, not noted so far, is this one; a fixture may be inside it."""
        if self.current is self._base:
            self.current = owner
            if threading.get_ident() == self._test_thread:
                self._context_variable.set(owner.creation_context)
        self._base = owner

    @contextmanager
    def owned_by(self, owner: Owner) -> Iterator[None]:
        """What is opened in this block is the owner's."""
        before, context = self.current, self._context_variable.get()
        is_outermost = before is self._base
        self.current = owner
        self._context_variable.set(owner.creation_context)
        try:
            yield
        finally:
            self.current = self._base if is_outermost else before
            is_unset = context is None and self.current is not NO_OWNER
            self._context_variable.set(self.current.creation_context if is_unset else context)

    def context_of_thread(self) -> CreationContext:
        """What is recorded with a socket where the context variable is not set."""
        return self._owner_of_thread().creation_context

    def by_name(self, name: object) -> Owner:
        """The owner of that name, as it was recorded with a socket."""
        found = self._owners.get(str(name))
        if found is None and isinstance(name, str) and name:
            # A thread or a task of a test has outlived it.
            found = self._owners[name] = Owner(name, self._nodeids.get(name, name), 0)
            found.finished = True
        return found or NO_OWNER

    def forget(self, owner: Owner) -> None:
        """Of a test that has left nothing, keep only where it was: a run has many."""
        self._owners.pop(owner.name, None)
        if owner.name != owner.nodeid:
            self._nodeids[owner.name] = owner.nodeid

    def _on_thread_start(self, thread: threading.Thread) -> None:
        context = self.context_of_variable()
        self._owners_by_thread[thread] = (
            self.by_name(context[OPENED_IN]) if context else self._owner_of_thread()
        )

    def _owner_of_thread(self) -> Owner:
        thread = threads.get(threading.get_ident())
        owner = self._owners_by_thread.get(thread) if thread is not None else None
        if owner is None:
            return self.current
        is_over = owner is NO_OWNER or owner.finished
        return self.current if is_over and _is_executor_worker(thread) else owner


def _is_executor_worker(thread: object) -> bool:
    """A worker of an executor serves every owner that submits, not only the first."""
    target = getattr(thread, THREAD_TARGET, None)
    return getattr(target, "__module__", None) == "concurrent.futures.thread"


class AnyioOwner:
    """Takes the owner into the task of anyio's test runner, which another owner has started."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Generator[None, object, object]:
        if "anyio_backend" not in pyfuncitem.fixturenames:
            return (yield)
        if not inspect.iscoroutinefunction(pyfuncitem.obj):
            return (yield)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pyfuncitem, "obj", self._with_owner(pyfuncitem.obj))
            return (yield)

    def _with_owner(
        self, function: Callable[..., Coroutine[Any, Any, Any]]
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        owner = self._ownership.current

        @functools.wraps(function)
        async def function_with_owner(*arguments: Any, **named: Any) -> Any:
            with self._ownership.owned_by(owner):
                return await function(*arguments, **named)

        return function_with_owner


_SCOPES = ("session", "package", "module", "class")
# How pytest calls the fixtures that it makes of the older ways to set up.
_OLDER_SETUPS = {
    "unittest_setUpClass_fixture": "setUpClass",
    "xunit_setup_class_fixture": "setup_class",
    "xunit_setup_module_fixture": "setup_module",
}


def fixture_name(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> str:
    """The name that a reader knows this fixture by, where it lives, and its parameter."""
    place = f" of {request.node.nodeid}" if request.node.nodeid not in ("", ".") else ""
    name = _plain_name(fixturedef)
    if name != fixturedef.argname:
        return f"{name}{place}"
    parameter = getattr(request, "param", None)
    shown = f"[{parameter!r:.40}]" if parameter is not None else ""
    return f"{fixturedef.scope} fixture {fixturedef.argname!r}{shown}{place}"


def _plain_name(fixturedef: pytest.FixtureDef[Any]) -> str:
    argname: str = fixturedef.argname
    plain = argname.lstrip("_")
    return next((name for start, name in _OLDER_SETUPS.items() if plain.startswith(start)), argname)


class WiderFixture:
    """A fixture that outlives a test.

    It keeps its value, its unfinished generator, and what its set-up has assigned to the class or
    the module.
    """

    def __init__(
        self, owner: Owner, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> None:
        self.owner = owner
        owner.fixture = _plain_name(fixturedef)
        if owner.fixture == fixturedef.argname:
            # Plugins wrap those that are coroutines.
            owner.code = getattr(inspect.unwrap(fixturedef.func), "__code__", None)
        # In whatever way it asks for it, this test uses it.
        owner.last_test = getattr(getattr(request, "_pyfuncitem", None), "nodeid", None)
        self.rank = _SCOPES.index(fixturedef.scope)
        self._fixturedef = fixturedef
        self._namespaces = [
            namespace
            for namespace in (
                request.cls if fixturedef.scope == "class" else None,
                request.module if fixturedef.scope == "module" else None,
            )
            if namespace is not None
        ]
        self._before = [
            {name: id(value) for name, value in vars(each).items()} for each in self._namespaces
        ]
        self._assigned: list[tuple[Any, str]] = []

    def note_use(self, item: pytest.Item | None) -> None:
        """Note the test that runs, if it uses this; one that asks for it as it runs is not seen."""
        if self._fixturedef.argname in getattr(item, "fixturenames", ()):
            self.owner.last_test = getattr(item, "nodeid", None)

    def note_assignments(self) -> None:
        """Note what the set-up has assigned."""
        for namespace, before in zip(self._namespaces, self._before, strict=True):
            for name, value in vars(namespace).items():
                if before.get(name) != id(value):
                    self._assigned.append((namespace, name))

    def find_roots(self) -> Iterator[object]:
        """The objects to walk from for what it keeps."""
        yield from self.find_result()
        yield list(getattr(self._fixturedef, "_finalizers", ()))
        for namespace, name in self._assigned:
            yield vars(namespace).get(name)

    def find_result(self) -> list[object]:
        """Its value, which pytest keeps until it has been finalized."""
        return [getattr(self._fixturedef, "cached_result", None)]

    def collect_failures(self) -> list[BaseException]:
        """The exception that its set-up raised, if it did."""
        result = getattr(self._fixturedef, "cached_result", None)
        error = result[2] if result is not None else None
        error = error[0] if isinstance(error, tuple) else error
        return [error] if isinstance(error, BaseException) else []
