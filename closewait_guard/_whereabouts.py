"""Which thread and which asyncio task the program is in, asked without side effects."""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["task_name", "threads"]

# Not threading.current_thread(), which registers a dummy for every foreign thread that asks.
threads: dict[int, Any] = threading._active  # type: ignore[attr-defined]


def task_name(asyncio: Any) -> str | None:
    """The name of the task that runs in this thread; None outside of one."""
    try:
        if asyncio._get_running_loop() is None:
            return None
        task = asyncio.current_task()
        return task.get_name() if task is not None else None
    except Exception:
        # asyncio is being imported at this moment, or a task class of somebody's has no names.
        return None
