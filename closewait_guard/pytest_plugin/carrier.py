"""anyio runs the tests of a module in one task: each must bring its owner along."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest

from closewait_guard.pytest_plugin.ownership import Ownership

__all__ = ["Carrier"]


class Carrier:
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
