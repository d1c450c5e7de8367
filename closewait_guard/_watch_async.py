"""Reports of a running program, one in every interval, from its event loop."""

from __future__ import annotations

import asyncio

from closewait_guard._guard import Guard
from closewait_guard._rounds import Rounds

__all__ = ["reporting"]


async def reporting(guard: Guard, interval: float | None, at_exit: bool | None) -> None:
    """Report at every interval until cancelled, without ever blocking the event loop."""
    rounds = Rounds(guard, interval)
    try:
        while True:
            await asyncio.sleep(rounds.pause)
            await asyncio.to_thread(rounds.go)
    finally:
        if guard.settings.at_exit if at_exit is None else at_exit:
            rounds.go()
