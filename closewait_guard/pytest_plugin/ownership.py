"""Whose socket is it? Each birth keeps the name of the test or the fixture that it happened in."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from closewait_guard.pytest_plugin import threads

if TYPE_CHECKING:
    from closewait_guard._vocabulary import Scalar

__all__ = ["BORN_IN", "NOBODY", "Owner", "Ownership"]

# The name under which a birth's context tells its owner.
BORN_IN = "born_in"

Kept = dict[str, "Scalar"]


class Owner:
    """A test or a wider fixture.

    Attributes:
        name: What reports call it; no two owners of a run have the same.
        nodeid: The test, or where the fixture lives.
        mark: What was born before is older than this mark of the guard's.
        over: It has been finished, and checked.
        kept: What each birth of its sockets keeps.
    """

    __slots__ = ("kept", "mark", "name", "nodeid", "over")

    def __init__(self, name: str, nodeid: str, mark: int) -> None:
        self.name = name
        self.nodeid = nodeid
        self.mark = mark
        self.over = False
        self.kept: Kept = {BORN_IN: name}


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
        threads.watch(self._started)

    def end(self) -> None:
        """Leave everything as it was found."""
        threads.unwatch(self._started)
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
        self._of_thread[thread] = self.called(kept[BORN_IN]) if kept else self._by_thread()

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
