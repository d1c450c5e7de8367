"""Let event loops that nobody runs at this moment close what they have been asked to close."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

from closewait_guard._heap import instances_of, kinds_of
from closewait_guard._objects import field
from closewait_guard.pytest_plugin.reach import reached

__all__ = ["Turns"]


class Turns:
    """The idle event loops that know a suspect; each call gives them one turn.

    After `transport.close()` a socket stays open until the loop has called back, and between two
    tests nobody runs the loop of a wider fixture.

    Args:
        targets: The suspects: the address of each socket, and a key.
    """

    def __init__(self, targets: dict[int, int]) -> None:
        self._targets = targets
        self._loops: list[weakref.ref[Any]] | None = None

    def __call__(self) -> None:
        asyncio = sys.modules.get("asyncio")
        if asyncio is None or asyncio._get_running_loop() is not None:
            return
        if self._loops is None:
            # By weak reference: a loop that is garbage is to be collected while we wait.
            self._loops = [weakref.ref(loop) for loop in _idle_loops(asyncio) if self._knows(loop)]
        for reference in self._loops:
            loop = reference()
            if loop is not None and _is_idle(loop):
                loop.call_soon(loop.stop)
                loop.run_forever()

    def _knows(self, loop: Any) -> bool:
        parts = (loop, field(loop, "_selector"))
        inside = (gc.get_referents(part) for part in parts if part is not None)
        return bool(reached([thing for things in inside for thing in things], self._targets))


def _idle_loops(asyncio: Any) -> Iterator[Any]:
    return filter(_is_idle, instances_of(kinds_of(asyncio.AbstractEventLoop)))


def _is_idle(loop: Any) -> bool:
    return not loop.is_closed() and not loop.is_running()
