"""In the process of a program that `run` has started: install the guard, and report at the end.

The launcher passes its configuration in the environment.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from closewait_guard import _api
from closewait_guard._clock import now
from closewait_guard._format import escape_control, pluralize
from closewait_guard._guard import Guard
from closewait_guard._monitor import Monitor
from closewait_guard._preload.status import Channel, Line, Status, as_text
from closewait_guard._render import render_text, render_with_header
from closewait_guard._signal import EarlyLooks, SuddenEnd, before_sudden_end, delayed_sigterm
from closewait_guard._stream import print_error, write_text
from closewait_guard.model import Report, Reporter, Verdict
from closewait_guard.settings import Settings

__all__ = [
    "FOLDER",
    "ChildConfig",
    "start",
]


# With an underscore before it: the settings refuse names that they do not know.
_VARIABLE = "_CLOSEWAIT_GUARD_RUN"
_MAIN = "_CLOSEWAIT_GUARD_MAIN"
_HELPERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
FOLDER = str(Path(__file__).parent)


class ChildConfig(NamedTuple):
    """What settings have no name for.

    Attributes:
        reporters: What gets the report at every interval, by name.
        channel: Where the launcher hears how a process ends; None if it does not wait for that.
        attribute: What opens native sockets.
    """

    reporters: tuple[str, ...]
    channel: Channel | None = None
    attribute: tuple[str, ...] = ()

    def environment(
        self, settings: Mapping[str, str], environ: Mapping[str, str]
    ) -> dict[str, str]:
        """The environment in which a program and its Python children are guarded."""
        paths = [FOLDER]
        # An empty path would stand for the directory that the program is started in.
        paths += [path for path in (environ.get("PYTHONPATH"),) if path]
        return {
            **environ,
            **settings,
            "PYTHONPATH": os.pathsep.join(paths),
            _VARIABLE: json.dumps(self),
        }

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """What the launcher has handed over."""
        reporters, channel, attribute = json.loads(environ[_VARIABLE])
        channel = None if channel is None else Channel.of(*channel)
        return cls(tuple(reporters), channel, tuple(attribute))

    @staticmethod
    def mark_main(environ: dict[str, str], pid: int) -> dict[str, str]:
        """The environment of the process that is the program, not a child of it."""
        return environ | {_MAIN: str(pid)}

    @staticmethod
    def is_main(environ: Mapping[str, str], pid: int) -> bool:
        """Whether this process is the program itself, not a child of it."""
        return environ.get(_MAIN) == str(pid)


def start() -> None:
    """Guard this process and those that it forks; whatever goes wrong, the program runs."""
    line: Line | None = None
    try:
        config = ChildConfig.from_environment(os.environ)
        line = _line(config)
        # One of our own: the program may install the process-wide one, with its own settings.
        guard = Guard(Settings.load(), _reporters(config)).install()
        guard._attribute_on_import(config.attribute)
        status = Status(line)
    except Exception as error:
        print_error(f"process {os.getpid()} is not guarded: {error}")
        if line is not None:
            with suppress(OSError):
                line.say(f"unguarded {escape_control(str(error))}")
        return
    _api.read_records_of(guard)
    ending = _Ending(guard, status)
    # Before all that the program registers, and so called after all of that.
    atexit.register(ending)
    _in_forked_children(ending, status)
    reporters = config.reporters or guard.settings.reporters
    if guard.settings.at_exit:
        guard._record_states_by(partial(_send_state, status))
    if reporters:
        # As text the last report comes from us.
        at_exit = guard.settings.at_exit and reporters != ("text",)
        Monitor(guard, at_exit=at_exit, in_children=True).start()


def _send_state(status: Status, report: Report) -> None:
    """For the launcher to print if this process ends without a last report."""
    status.send_state(as_text(_without_open(report)))


def _line(config: ChildConfig) -> Line | None:
    if config.channel is None:
        return None
    return Line(config.channel, is_main=ChildConfig.is_main(os.environ, os.getpid()))


def _reporters(config: ChildConfig) -> list[Reporter | str]:
    """Text goes to stderr itself, not to what the program puts in its place, such as a logger."""
    if "text" not in config.reporters:
        return list(config.reporters)
    from closewait_guard.reporters import text

    return [text(sys.__stderr__) if name == "text" else name for name in config.reporters]


class _Ending:
    """The last report of a process, when all that the program does at exit is done."""

    def __init__(self, guard: Guard, status: Status) -> None:
        self._guard = guard
        self._status = status
        self._pid = os.getpid()
        self._began = now()
        self._looks = EarlyLooks(guard)
        self._forget_sudden_ends = before_sudden_end(self._on_sudden_end, status.resume)

    def __call__(self) -> None:
        # A pool terminates workers that are about to end by themselves.
        with delayed_sigterm():
            # Without a grace time: what is not closed by now never will be.
            self._report(self._check)
        self._forget_sudden_ends()
        with suppress(Exception):
            self._looks.stop()
            # A thread that writes to stderr while the interpreter ends would have it abort.
            self._guard.uninstall()

    def after_fork(self) -> None:
        """In the child."""
        self._began = now()

    def _on_sudden_end(self, how: SuddenEnd) -> None:
        is_over_at_once = how.is_exec or now() - self._began < self._guard.settings.grace
        if self._status.has_ended or (is_over_at_once and self._is_bystander()):
            # What it has only by the fork are copies, which its end closes.
            return
        # In the middle of the program's work, what its peers close now is none of its leaks.
        scan = self._check
        if how.is_interrupted:
            scan = partial(self._guard._pipeline.scan, is_last=True)
        self._report(scan, is_exec=how.is_exec)

    def _check(self) -> Report:
        return self._guard._pipeline.check(0, is_last=True)

    def _report(self, scan: Callable[[], Report], *, is_exec: bool = False) -> None:
        try:
            report = self._without_copies(self._looks.add_closed_by_end(scan()))
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self._status.end(f"failed {escape_control(why)}", is_exec=is_exec)
            print_error(f"process {os.getpid()} cannot report: {why}")
            return
        is_silent = self._is_bystander() or self._is_helper()
        is_wanted = self._guard.settings.at_exit and (bool(report.leaks) or not is_silent)
        shown = _without_open(report)
        text = as_text(shown) if is_wanted else ""
        is_printed = self._status.end(_verdict(report), text, is_exec=is_exec)
        if is_wanted and not is_printed:
            with suppress(Exception):
                _print_report(shown)

    def _without_copies(self, report: Report) -> Report:
        """Without the copies that a child has not kept for longer than the grace time."""
        lived, grace = now() - self._began, self._guard.settings.grace
        findings = tuple(
            each
            for each in report.findings
            if each.verdict is not Verdict.INHERITED
            or min(lived, each.observation.peer_closed_for or lived) >= grace
        )
        return replace(report, findings=findings)

    def _is_bystander(self) -> bool:
        """Whether this is a forked child that has opened no socket of its own."""
        return self._pid != os.getpid() and not self._status.has_opened

    def _is_helper(self) -> bool:
        """Whether this process only starts or counts others for `multiprocessing`."""
        command = " ".join(sys.orig_argv)
        return self._pid == os.getpid() and any(name in command for name in _HELPERS)


def _verdict(report: Report) -> str:
    """What is reported to the launcher: what could not be looked at may have leaked."""
    if report.leaks:
        return "leaked"
    undescribed = sum(not leak.observation.is_described for leak in report.findings)
    if undescribed:
        return f"failed looking at {pluralize(undescribed, 'socket')} has failed"
    return "clean"


def _without_open(report: Report) -> Report:
    wrong = tuple(leak for leak in report.findings if leak.verdict is not Verdict.OPEN)
    return replace(report, findings=wrong)


def _print_report(report: Report) -> None:
    """Without a launcher: the program itself always; a child of it only when it has leaked."""
    if ChildConfig.is_main(os.environ, os.getpid()):
        write_text(sys.__stderr__, render_text(report))
    elif report.leaks:
        write_text(sys.__stderr__, render_with_header(report))


def _in_forked_children(ending: _Ending, status: Status) -> None:
    def in_child() -> None:
        ending.after_fork()
        with suppress(Exception):
            status.after_fork()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=in_child)
