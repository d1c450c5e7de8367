"""Run a function, or a coroutine function, inside a context manager."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar, cast

__all__ = [
    "around",
]


_F = TypeVar("_F", bound=Callable[..., object])


def around(function: _F, enter: Callable[[], Any]) -> _F:
    """Decorate a function so that each call runs inside a fresh `enter()`.

    A coroutine function uses the asynchronous side of the context manager where it has one.
    """
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"{function.__qualname__} is a generator, which runs in pieces: "
            "use `with` inside it instead of a decorator"
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
