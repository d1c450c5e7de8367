"""Labels that every socket born inside a block carries."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

from closewait_guard._decorate import around
from closewait_guard._objects import exact_text

__all__ = ["current_labels", "label"]

_F = TypeVar("_F", bound=Callable[..., object])

_labels: ContextVar[tuple[str, ...]] = ContextVar("closewait_guard_labels", default=())

# Bound once: it is asked for at every birth.
current_labels = _labels.get


class label:  # noqa: N801 - reads as a statement: with label("x")
    """Name what the program is doing; sockets born meanwhile carry the name.

    Works as a context manager and as a decorator of functions and coroutine functions. Labels
    nest, and follow tasks and threads as context variables do.

    Example:
        >>> with label("refresh-prices"):
        ...     current_labels()
        ('refresh-prices',)
    """

    def __init__(self, *names: str) -> None:
        self._names = tuple(exact_text(name) for name in names)

    def __enter__(self) -> None:
        _labels.set(_labels.get() + self._names)

    def __exit__(self, *failure: object) -> None:
        # Without a token to keep, one label may serve many threads and tasks at once.
        labels = _labels.get()
        _labels.set(labels[: len(labels) - len(self._names)])

    def __call__(self, function: _F) -> _F:
        return around(function, lambda: label(*self._names))
