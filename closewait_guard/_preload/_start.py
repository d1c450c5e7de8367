"""In the program's process: install the guard, and report at the end."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from closewait_guard._guard import Guard
from closewait_guard._monitor import Monitor
from closewait_guard._preload._handover import Handover
from closewait_guard._render import dated, render_text
from closewait_guard._stream import print_error, put
from closewait_guard.model import Report, Reporter, Verdict
from closewait_guard.settings import Settings

__all__ = ["start"]


def start() -> None:
    """Guard this process and those that it forks; whatever goes wrong, the program runs."""
    try:
        handover = Handover.taken(os.environ)
        # One of our own: the program may install the process-wide one, with its own settings.
        guard = Guard(Settings.load(), _reporters(handover)).install()
    except Exception as error:
        print_error(f"process {os.getpid()} is not guarded: {error}")
        return
    ending = _Ending(guard, handover)
    # Before all that the program registers, and so called after all of that.
    atexit.register(ending)
    _at_end_of_workers(ending)
    reporters = handover.reporters or guard.settings.reporters
    if reporters:
        # As text the last report comes from us.
        at_exit = guard.settings.at_exit and reporters != ("text",)
        Monitor(guard, at_exit=at_exit, in_children=True).start()


def _reporters(handover: Handover) -> list[Reporter | str]:
    """Text goes to stderr itself, not to what the program puts in its place, such as a logger."""
    if "text" not in handover.reporters:
        return list(handover.reporters)
    from closewait_guard.reporters import text

    return [text(sys.__stderr__) if name == "text" else name for name in handover.reporters]


class _Ending:
    """The last report of a process, when all that the program does at exit is done."""

    def __init__(self, guard: Guard, handover: Handover) -> None:
        self._guard = guard
        self._handover = handover

    def __call__(self) -> None:
        with suppress(Exception):
            report = _final(self._guard)
            if report.accused and self._handover.verdict:
                # By its name: there may be no descriptor left.
                os.truncate(self._handover.verdict, 1)
            if self._guard.settings.at_exit:
                _tell(report)


def _final(guard: Guard) -> Report:
    """Without a grace time: what is not closed by now never will be."""
    report = guard.check(0)
    wrong = tuple(leak for leak in report.leaks if leak.verdict is not Verdict.OPEN)
    return replace(report, leaks=wrong)


def _tell(report: Report) -> None:
    """The program itself always; a child of it only when it has leaked."""
    is_main = Handover.is_main(os.environ, os.getpid())
    if is_main or report.accused:
        put(sys.__stderr__, render_text(report) if is_main else dated(report))


def _at_end_of_workers(ending: Callable[[], object]) -> None:
    """Workers of multiprocessing end without atexit, but have hooks of their own."""

    def in_child() -> None:
        util: Any = sys.modules.get("multiprocessing.util")
        if util is not None:
            # It forgets all hooks in the child, then calls this, which makes one anew.
            hook = partial(util.Finalize, None, ending, exitpriority=-1_000_000)
            util.register_after_fork(ending, lambda _: hook())

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=in_child)
