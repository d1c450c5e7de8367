"""Whose socket is it? Each birth keeps the name of the test or the fixture that it happened in."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from closewait_guard.pytest_plugin import threads

__all__ = ["BORN_IN", "NOBODY", "Owner", "Ownership"]

# The name under which a birth's context tells its owner.
BORN_IN = "born_in"


class Owner:
    """A test or a wider fixture.

    Attributes:
        name: What reports call it; no two owners of a run have the same.
        nodeid: The test, or where the fixture lives.
        mark: What was born before is older than this mark of the guard's.
        over: It has been finished, and checked.
        context: What each birth of its sockets keeps.
    """

    __slots__ = ("context", "mark", "name", "nodeid", "over")

    def __init__(self, name: str, nodeid: str, mark: int) -> None:
        self.name = name
        self.nodeid = nodeid
        self.mark = mark
        self.over = False
        self.context = {BORN_IN: name}


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
        self._of_context: ContextVar[Owner | None] = ContextVar("socket_owner", default=None)
        self._of_thread: weakref.WeakKeyDictionary[threading.Thread, Owner] = (
            weakref.WeakKeyDictionary()
        )

    def begin(self) -> None:
        """Take note of threads from now on."""
        self._runner = threading.get_ident()
        threads.watch(self._started)

    def end(self) -> None:
        """Leave everything as it was found."""
        threads.unwatch(self._started)
        self._of_context.set(None)

    def new(self, name: str, nodeid: str, mark: int) -> Owner:
        """An owner; one that comes for the second time is told from the first."""
        owner, run = Owner(name, nodeid, mark), 1
        while self._owners.setdefault(owner.name, owner) is not owner:
            run += 1
            owner = Owner(f"{name} (run {run})", nodeid, mark)
        return owner

    def turn_of(self, owner: Owner) -> None:
        """From now on, what happens in this thread is the owner's."""
        self._base = self.present = owner
        self._of_context.set(owner)

    def take_over(self, owner: Owner) -> None:
        """A turn that nobody had noted has been this owner's; a fixture may be inside it."""
        if self.present is self._base:
            self.present = owner
            if threading.get_ident() == self._runner:
                self._of_context.set(owner)
        self._base = owner

    @contextmanager
    def turn(self, owner: Owner) -> Iterator[None]:
        """The owner's turn is inside somebody else's."""
        before, of_context = self.present, self._of_context.get()
        is_outermost = before is self._base
        self.present = owner
        self._of_context.set(owner)
        try:
            yield
        finally:
            self.present = self._base if is_outermost else before
            is_unset = of_context is None and self.present is not NOBODY
            self._of_context.set(self.present if is_unset else of_context)

    def asker(
        self, further: Callable[[], Mapping[str, object]] | None
    ) -> Callable[[], Mapping[str, object]]:
        """What to call at each birth: it says what to keep, and what else the program wants."""
        in_context, by_thread = self._of_context.get, self._by_thread

        def context() -> Mapping[str, object]:
            return (in_context() or by_thread()).context

        return context if further is None else lambda: {**further(), **context()}

    def called(self, name: object) -> Owner:
        """The owner of that name, as a birth has kept it."""
        return self._owners.get(str(name), NOBODY)

    def _started(self, thread: threading.Thread) -> None:
        self._of_thread[thread] = self._of_context.get() or self._by_thread()

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
