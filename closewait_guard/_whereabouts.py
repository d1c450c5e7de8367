"""Which thread and which asyncio task the program is in, asked without side effects."""

from __future__ import annotations

import sys
import threading
from typing import Any

from closewait_guard._interruptions import interrupts
from closewait_guard._objects import exact_text

__all__ = ["task_name", "threads"]

# Not threading.current_thread(), which registers a dummy for every foreign thread that asks.
threads: dict[int, Any] = threading._active  # type: ignore[attr-defined]


def task_name() -> str | None:
    """The name of the task that runs in this thread's event loop; None outside of one."""
    try:
        task = sys.modules["asyncio"].current_task()
        return exact_text(task.get_name()) if task is not None else None
    except Exception as error:
        if interrupts(error):
            raise
        # A task class of somebody's has no names.
        return None
