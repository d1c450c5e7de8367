"""The weak table of connections that were taken from pools and not given back, and who took them.

Nothing here takes a lock: a connection may be taken and given back anywhere.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from closewait_guard._capture.context import PlainContext
from closewait_guard._capture.creation import (
    ORIGIN,
    SERIAL,
    SOCK,
    STACK,
    Creation,
    CreationTuple,
    with_serial,
)
from closewait_guard._capture.dropped import LockFreeCounter
from closewait_guard._capture.recorder import Recording, make_recorder
from closewait_guard._enums import Origin
from closewait_guard._interruptions import interrupts

if TYPE_CHECKING:
    from closewait_guard._libraries import CheckoutKind

__all__ = [
    "CheckoutTable",
    "OpenCheckout",
    "answer_of",
]


class _Sockets(Protocol):
    """What is needed of the registry."""

    @property
    def next_serial(self) -> Callable[[], int]: ...
    def on_error(self) -> None: ...


class OpenCheckout(NamedTuple):
    """A connection that is out of its pool: where it was taken, by weak reference, and its kind."""

    creation: CreationTuple
    pool: Any
    kind: CheckoutKind

    @property
    def serial(self) -> int:
        """Its own."""
        serial: int = self.creation[SERIAL]
        return serial

    @property
    def taken_at(self) -> float:
        """Seconds since the epoch."""
        return Creation._make(self.creation).opened_at or 0.0


@functools.cache
def _find_continue_in_greenlets() -> Callable[[list[Any], int], None]:
    # Not before it is needed, as for tasks. Each import statement takes as long as all the rest.
    from closewait_guard._capture.awaiting import continue_in_greenlets

    return continue_in_greenlets


class CheckoutTable:
    """Records what pools hand out, until it is given back.

    Args:
        recording: How to record.
        context: Calls the program's context provider, if it has one.
        counter: Counts what takes a number in the series of the sockets and is none.
        sockets: Have that series.
    """

    def __init__(
        self,
        recording: Recording,
        context: PlainContext | None,
        counter: LockFreeCounter,
        sockets: _Sockets,
    ) -> None:
        # By identity of the connection: where it was taken; and its number, the pool if there can
        # be a weak reference to it, and the kind. Plain: a named tuple takes long to make.
        self._creations: dict[int, CreationTuple] = {}
        self._taken: dict[int, tuple[int, weakref.ref[Any] | None, CheckoutKind]] = {}
        self._recorder = make_recorder(self._creations, {}, context, recording, id)
        self._record, self._depth = self._recorder.on_create, recording.stack_depth
        self._next_serial, self._count = sockets.next_serial, counter.count
        self._on_error = sockets.on_error
        self._stops: dict[type, Callable[[], None]] = {}

    def listen(self, pool_class: type, kind: CheckoutKind) -> None:
        """Record what the pools of a class hand out, by their events, from now on. Idempotent."""
        if pool_class not in self._stops and kind.listen is not None:
            calls = functools.partial(self.take, kind), functools.partial(self.give_back, kind)
            self._stops[pool_class] = kind.listen(pool_class, *calls)

    def stop(self) -> None:
        """Record no more, and forget what is out: that it is given back would not be seen."""
        while self._stops:
            self._stops.popitem()[1]()
        self._forget()

    def take(self, kind: CheckoutKind, pool: object, connection: object) -> None:
        """Record that a connection was taken, by the caller of the pool."""
        try:
            entry: Any = kind.entry(connection)
            key = id(entry)
            self._record(entry, None)
            if "greenlet" in sys.modules:
                _find_continue_in_greenlets()(self._creations[key][STACK], self._depth)
            ref = weakref.ref(pool) if kind.pool_of is None else None
            self._taken[key] = self._next_serial(), ref, kind
            self._count()
        except BaseException as error:
            if interrupts(error):
                raise
            self._on_error()

    def give_back(self, kind: CheckoutKind, connection: object) -> None:
        """Forget a connection that was given back, or has left its pool."""
        try:
            self._pop(id(kind.entry(connection)))
        except Exception as error:  # It is no connection of this pool, as the pool will say.
            if interrupts(error):
                raise

    def _pop(self, key: int) -> None:
        self._taken.pop(key, None)
        self._creations.pop(key, None)

    def has_any_out(self, since: int) -> bool:
        """Whether a connection that was taken after a mark is out. True may be wrong."""
        return any(serial > since for serial, *_ in self._taken.copy().values())

    def is_out(self, serial: int) -> bool:
        """Whether the connection of a check-out is out still."""
        return self._ask(serial, lambda kind, connection: kind.is_out(connection)) is True

    def borrowed(self, serial: int) -> object:
        """What the program has of a connection that it has taken, if it is not back."""
        return self._ask(serial, lambda kind, connection: kind.borrowed(connection))

    def _ask(self, serial: int, question: Callable[[CheckoutKind, Any], object]) -> object:
        """Of all that is out, one: to ask each whether it is would take long."""
        for key, (number, _, kind) in self._taken.copy().items():
            creation = self._creations.get(key) if number == serial else None
            if creation is not None and (connection := creation[SOCK]()) is not None:
                return answer_of(functools.partial(question, kind), connection, otherwise=None)
        return None

    def open_checkouts(self) -> list[OpenCheckout]:
        """What is out at this moment, the oldest first."""
        found = []
        for key, (serial, ref, kind) in self._taken.copy().items():
            creation = self._creations.get(key)
            connection = None if creation is None else creation[SOCK]()
            find = kind.pool_of
            pool = (
                ref() if ref is not None else find and answer_of(find, connection, otherwise=None)
            )
            if creation is None or connection is None or pool is None:
                self._pop(key)
            elif answer_of(kind.is_out, connection, otherwise=False):
                known = with_serial(creation, serial)
                known = (*known[:ORIGIN], Origin.CHECKED_OUT, *known[ORIGIN + 1 :])
                found.append(OpenCheckout(known, pool, kind))
        return sorted(found, key=lambda each: each.serial)

    def _forget(self) -> None:
        self._taken.clear()
        self._creations.clear()

    def after_fork(self) -> None:
        """In the child: what is out is the parent's."""
        self._recorder.pid = os.getpid()
        self._forget()


def answer_of(question: Callable[[Any], Any], thing: object, otherwise: Any) -> Any:
    """What a question of a library's kind has as its answer; another value where it raises."""
    try:
        return question(thing)
    except Exception:
        return otherwise
