"""What the program was doing when it opened a socket: labels, and the answer of a context provider.

The answer is made plain, so that a record keeps nothing alive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from math import isfinite
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar, cast

from closewait_guard._interruptions import interrupts
from closewait_guard._live import exact_text, is_exactly, type_qualname

if TYPE_CHECKING:
    from closewait_guard._enums import Scalar
    from closewait_guard.settings import ContextProvider

__all__ = [
    "LABELS",
    "PlainContext",
    "around",
    "label",
]


class PlainContext:
    """Calls a context provider; turns what it returns into plain values; survives its failures."""

    def __init__(self, provider: ContextProvider) -> None:
        self._provider = provider
        self.failure: str | None = None
        self._threads_asking: set[int] = set()

    @classmethod
    def of(cls, provider: ContextProvider | str | None) -> PlainContext | None:
        """The one that a setting asks for, or None."""
        if provider == "structlog":
            from closewait_guard._structlog import bound_context

            return cls(bound_context())
        return cls(provider) if callable(provider) else None

    @property
    def provider(self) -> Callable[[], dict[str, Scalar] | None]:
        """What to call at each creation of a socket."""
        return self.__call__

    @property
    def fallback_provider(self) -> Callable[[], dict[str, Scalar]]:
        """What to call where that has returned nothing."""
        return dict

    def __call__(self) -> dict[str, Scalar]:
        # The provider may open sockets of its own, which have no context.
        thread = get_ident()
        if thread in self._threads_asking:
            return {}
        self._threads_asking.add(thread)
        try:
            return self._ask()
        finally:
            self._threads_asking.discard(thread)

    def _ask(self) -> dict[str, Scalar]:
        try:
            items = list(self._provider().items())
        except Exception as error:
            if interrupts(error):
                raise
            self._note("the context callable failed", error)
            return {}
        return dict(self._plain_items(items))

    def _plain_items(self, items: Iterable[tuple[object, object]]) -> Iterator[tuple[str, Scalar]]:
        """Each by itself: one that has no text loses no other."""
        for name, value in items:
            try:
                yield exact_text(name), _plain(value)
            except Exception as error:
                if interrupts(error):
                    raise
                self._note("a value of the context has no text", error)

    def _note(self, what: str, error: Exception) -> None:
        kind = type_qualname(type(error))
        try:
            self.failure = f"{what}: {kind}: {exact_text(error)}"
        except Exception as failure:
            if interrupts(failure):
                raise
            self.failure = f"{what}: {kind}"


def _plain(value: object) -> Scalar:
    """Exact built-in types pass; a subclass or any other object becomes its text.

    So do numbers that JSON has no way to write, or that cannot be written in decimal at all.
    """
    if type(value) is float and not isfinite(value):
        return str(value)
    if type(value) is int and not -_MAX_INT <= value <= _MAX_INT:
        return hex(value)[:_MAX_CHARACTERS]
    if is_exactly(value, _SCALARS):
        return value  # type: ignore[return-value]
    return exact_text(value)


_MAX_INT = 2**63 - 1
_MAX_CHARACTERS = 80
# Compared by identity: a metaclass may define what its classes are equal to.
_SCALARS = (str, int, float, bool, type(None))


_F = TypeVar("_F", bound=Callable[..., object])

# What is no text has one when it is read: a request that has not found its route yet.
LABELS: ContextVar[tuple[object, ...]] = ContextVar("closewait_guard_labels", default=())


class label:  # noqa: N801 - reads as a statement: with label("x")
    """Name what the program is doing; sockets opened meanwhile carry the name.

    Works as a context manager and as a decorator of functions and coroutine functions. Labels
    nest, and follow tasks and threads as context variables do.

    Example:
        >>> with label("refresh-prices"):
        ...     LABELS.get()
        ('refresh-prices',)
    """

    def __init__(self, *names: str) -> None:
        self._names = tuple(exact_text(name) for name in names)

    def __enter__(self) -> None:
        LABELS.set(LABELS.get() + self._names)

    def __exit__(self, *failure: object) -> None:
        # Without a token to keep, one label may serve many threads and tasks at once.
        labels = LABELS.get()
        LABELS.set(labels[: len(labels) - len(self._names)])

    def __call__(self, function: _F) -> _F:
        return around(function, lambda: label(*self._names))


def around(function: _F, enter: Callable[[], Any]) -> _F:
    """Decorate a function so that each call runs inside a fresh `enter()`.

    A coroutine function uses the asynchronous side of the context manager where it has one.
    """
    # It takes long to import, and most programs decorate nothing.
    import inspect

    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"cannot decorate the generator function {function.__qualname__}: use `with` inside it"
        )

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            async with _asynchronous(enter()):
                return await function(*args, **kwargs)

        return cast(_F, call_async)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with enter():
            return function(*args, **kwargs)

    return cast(_F, call)


def _asynchronous(manager: Any) -> Any:
    return manager if isinstance(manager, AbstractAsyncContextManager) else _lifted(manager)


@asynccontextmanager
async def _lifted(manager: Any) -> Any:
    with manager as value:
        yield value
