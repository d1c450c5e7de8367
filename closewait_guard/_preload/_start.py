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
from closewait_guard._lines import printable
from closewait_guard._monitor import Monitor
from closewait_guard._preload._handover import Handover
from closewait_guard._preload._line import Line
from closewait_guard._preload._status import Status
from closewait_guard._render import dated, render_text
from closewait_guard._stream import print_error, put
from closewait_guard._words import count_of
from closewait_guard.model import Report, Reporter, Verdict
from closewait_guard.settings import Settings

__all__ = ["start"]


def start() -> None:
    """Guard this process and those that it forks; whatever goes wrong, the program runs."""
    try:
        handover = Handover.taken(os.environ)
        line = _line(handover)
        # One of our own: the program may install the process-wide one, with its own settings.
        guard = Guard(Settings.load(), _reporters(handover)).install()
        status = Status(line)
    except Exception as error:
        print_error(f"process {os.getpid()} is not guarded: {error}")
        return
    ending = _Ending(guard, status)
    # Before all that the program registers, and so called after all of that.
    atexit.register(ending)
    _in_forked_children(ending, status)
    reporters = handover.reporters or guard.settings.reporters
    if reporters:
        # As text the last report comes from us.
        at_exit = guard.settings.at_exit and reporters != ("text",)
        Monitor(guard, at_exit=at_exit, in_children=True).start()


def _line(handover: Handover) -> Line | None:
    if handover.channel is None:
        return None
    return Line(handover.channel, is_main=Handover.is_main(os.environ, os.getpid()))


def _reporters(handover: Handover) -> list[Reporter | str]:
    """Text goes to stderr itself, not to what the program puts in its place, such as a logger."""
    if "text" not in handover.reporters:
        return list(handover.reporters)
    from closewait_guard.reporters import text

    return [text(sys.__stderr__) if name == "text" else name for name in handover.reporters]


class _Ending:
    """The last report of a process, when all that the program does at exit is done."""

    def __init__(self, guard: Guard, status: Status) -> None:
        self._guard = guard
        self._status = status

    def __call__(self) -> None:
        self._report()
        with suppress(Exception):
            # A thread that writes to stderr while the interpreter ends would have it abort.
            self._guard.uninstall()

    def _report(self) -> None:
        try:
            # Without a grace time: what is not closed by now never will be.
            report = self._guard.check(0)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self._status.end(f"failed {printable(why)}")
            print_error(f"process {os.getpid()} cannot report: {why}")
            return
        self._status.end(_verdict(report))
        if self._guard.settings.at_exit:
            with suppress(Exception):
                _tell(_without_open(report), self._status.lost_workers())


def _verdict(report: Report) -> str:
    """What the launcher is told: what could not be looked at may have leaked."""
    if report.accused:
        return "leaked"
    undescribed = sum(not leak.observation.is_described for leak in report.leaks)
    if undescribed:
        return f"failed looking at {count_of(undescribed, 'socket')} has failed"
    return "clean"


def _without_open(report: Report) -> Report:
    wrong = tuple(leak for leak in report.leaks if leak.verdict is not Verdict.OPEN)
    return replace(report, leaks=wrong)


def _tell(report: Report, lost_workers: int) -> None:
    """The program itself always; a child of it only when it has leaked."""
    if not Handover.is_main(os.environ, os.getpid()):
        if report.accused:
            put(sys.__stderr__, dated(report))
        return
    text = render_text(report)
    if lost_workers:
        what = f"{count_of(lost_workers, 'worker process')} ended without a report (by a signal or"
        text += f"{what}\n  os._exit()): use --interval or --signal to see their sockets.\n"
    put(sys.__stderr__, text)


def _in_forked_children(ending: Callable[[], object], status: Status) -> None:
    """Workers of multiprocessing end without atexit, but have hooks of their own."""

    def in_child() -> None:
        with suppress(Exception):
            status.after_fork()
        util: Any = sys.modules.get("multiprocessing.util")
        if util is not None:
            # It forgets all hooks in the child, then calls this, which makes one anew.
            hook = partial(util.Finalize, None, ending, exitpriority=-1_000_000)
            util.register_after_fork(ending, lambda _: hook())

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=in_child)
