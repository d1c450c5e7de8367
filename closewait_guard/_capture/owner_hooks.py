"""The wrappers of the methods of owners, which are to be closed, and of pools of connections."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Protocol

from closewait_guard._capture.hooks import method_object
from closewait_guard._capture.speedups import find_speedups
from closewait_guard._capture.stack import is_called_by
from closewait_guard._cpython import current_frame, dropping_errors
from closewait_guard._interruptions import DeferredErrors, interrupts
from closewait_guard._live import is_a, variable_of

if TYPE_CHECKING:
    from closewait_guard._libraries import CheckoutKind, OwnerKind

__all__ = [
    "OwnerEvents",
    "OwnerSubscribers",
    "objects_being_made",
    "owner_wrappers",
    "pool_wrappers",
]


# The flag of a coroutine function, as in `inspect`, which takes long to import.
_COROUTINE = 0x80


class OwnerEvents(Protocol):
    """What a subscriber is called for. Nothing that it raises reaches the program."""

    @property
    def on_make(self) -> Callable[[Any, object], None]:
        """Record an owner that was made, by its caller; the second argument is None."""

    def on_made(self, owner: object, kind: OwnerKind, /) -> None:
        """Called next, with its kind."""

    def on_close(self, owner: object, /) -> None:
        """Its close is being called, for a kind that does not say whether it is closed."""

    def on_finalize(self, owner: object, /) -> None:
        """An owner is being finalized. Take no lock here."""

    def on_error(self) -> None:
        """One of the calls above raised."""

    @property
    def on_take(self) -> Callable[[CheckoutKind, object, object], None]:
        """A pool has handed out a connection. Does not raise."""

    @property
    def on_give_back(self) -> Callable[[CheckoutKind, object], None]:
        """A connection is about to be given back to its pool. Does not raise."""


class OwnerSubscribers:
    """What to call. Replaced as a whole, so that a loop in another thread misses none.

    Attributes:
        making_calls: What to call for an owner that was made, and when that raises.
        close_calls: What to call for one that is being closed.
        take_calls: What to call for what a pool has handed out.
        give_back_calls: What to call for what is being given back.
    """

    __slots__ = (
        "close_calls",
        "current",
        "give_back_calls",
        "making_calls",
        "speedups",
        "take_calls",
    )

    def __init__(self, *, speedups: bool = False) -> None:
        self.speedups = speedups
        self.replace(())

    def replace(self, subscribers: tuple[OwnerEvents, ...]) -> None:
        """Call these from now on, and no others."""
        self.current = subscribers
        # To look the methods up takes longer than to call them.
        self.making_calls = tuple(
            (each.on_make, each.on_made, each.on_error) for each in subscribers
        )
        self.close_calls = tuple(each.on_close for each in subscribers)
        self.take_calls = tuple(each.on_take for each in subscribers)
        self.give_back_calls = tuple(each.on_give_back for each in subscribers)


_Wrap = Callable[[Any, OwnerSubscribers], Any]


def owner_wrappers(kind: OwnerKind) -> dict[str, _Wrap]:
    """What to wrap of the class of a kind, by the name of the method."""
    closes = dict.fromkeys(kind.closes, _wrap_close)
    return {"__init__": functools.partial(_wrap_init, kind), "__del__": _wrap_del, **closes}


def _wrap_init(kind: OwnerKind, original: Any, subscribers: OwnerSubscribers) -> Any:
    part_of = kind.part_of

    @functools.wraps(original)
    def __init__(self: object, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if part_of and is_called_by(current_frame(1), part_of):
            # Another owner, such as a pool, has made it for itself, and stands for it.
            return
        for on_make, on_made, on_error in subscribers.making_calls:
            try:
                # From here, because it counts the calls up to that of the program.
                on_make(self, None)
                on_made(self, kind)
            except BaseException as error:
                if interrupts(error):
                    raise
                on_error()

    return __init__


def _wrap_close(original: Any, subscribers: OwnerSubscribers) -> Any:
    @functools.wraps(original)
    def close(self: object, *args: Any, **kwargs: Any) -> Any:
        for on_close in subscribers.close_calls:
            on_close(self)
        return original(self, *args, **kwargs)

    return close


def _wrap_del(original: Any, subscribers: OwnerSubscribers) -> Any:
    """Notifies of owners that are finalized; then calls the finalizer that was there, if any.

    Where there was none, all that calls is in C, as for sockets: see `hooks.wrap_del`. Else what is
    raised is reported of a function with the name that it has without us.
    """

    def notify(owner: object) -> None:
        for subscriber in subscribers.current:
            try:
                subscriber.on_finalize(owner)
            except BaseException as error:
                if interrupts(error):
                    deferred.raise_later(error)
                else:
                    subscriber.on_error()

    deferred = DeferredErrors((notify.__code__,))
    found = find_speedups() if original is None and subscribers.speedups else None
    if found is not None:
        # In place of the descriptor, and of a finalizer that was there: `callable` answers 0 or 1,
        # so that each owner counts as open, and runs no code of the owner.
        return found.finalizer(callable, notify, callable, is_for_open_only=True)
    notify_quietly = dropping_errors(notify)
    if original is None:
        return functools.lru_cache(0)([method_object("__eq__", notify_quietly)].__contains__)

    @functools.wraps(original)
    def __del__(self: object) -> None:  # noqa: N807
        notify_quietly(self)
        original(self)

    return __del__


def pool_wrappers(kind: CheckoutKind) -> dict[str, dict[str, _Wrap]]:
    """What to wrap for a kind of pools: by the class, and the name of its method."""
    takes: dict[str, _Wrap] = {kind.takes: functools.partial(_wrap_take, kind)}
    gives_back: dict[str, _Wrap] = {kind.gives_back: functools.partial(_wrap_give_back, kind)}
    if kind.taken_class:
        return {kind.pool_class: takes, kind.taken_class: gives_back}
    return {kind.pool_class: takes | gives_back}


def _wrap_take(kind: CheckoutKind, original: Any, subscribers: OwnerSubscribers) -> Any:
    @functools.wraps(original)
    def take(self: Any, *args: Any, **kwargs: Any) -> Any:
        connection = original(self, *args, **kwargs)
        for on_take in subscribers.take_calls:
            on_take(kind, self, connection)
        return connection

    @functools.wraps(original)
    async def take_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        connection = await original(self, *args, **kwargs)
        for on_take in subscribers.take_calls:
            on_take(kind, self, connection)
        return connection

    return take_async if _is_async(original) else take


def _wrap_give_back(kind: CheckoutKind, original: Any, subscribers: OwnerSubscribers) -> Any:
    is_of_pool = not kind.taken_class

    # Noted before the call: after it, another thread may have taken it.
    @functools.wraps(original)
    def give_back(self: Any, *args: Any, **kwargs: Any) -> Any:
        for connection in (args[:1] or kwargs.values()) if is_of_pool else (self,):
            for on_give_back in subscribers.give_back_calls:
                on_give_back(kind, connection)
        return original(self, *args, **kwargs)

    @functools.wraps(original)
    async def give_back_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        for connection in (args[:1] or kwargs.values()) if is_of_pool else (self,):
            for on_give_back in subscribers.give_back_calls:
                on_give_back(kind, connection)
        return await original(self, *args, **kwargs)

    return give_back_async if _is_async(original) else give_back


def _is_async(function: Any) -> bool:
    return bool(getattr(getattr(function, "__code__", None), "co_flags", 0) & _COROUTINE)


def objects_being_made(
    tracked: Iterable[tuple[type, OwnerKind]],
) -> Iterator[tuple[object, OwnerKind, CodeType]]:
    """The objects of some classes whose constructors are calls under way in this thread.

    Each with the code of such a call, the innermost first.
    """
    frame: FrameType | None = current_frame(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            made = variable_of(frame, "self")
            for cls, kind in tracked:
                if is_a(made, cls) and not is_called_by(frame, kind.part_of):
                    yield made, kind, frame.f_code
        frame = frame.f_back
