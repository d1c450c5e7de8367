"""In the process of a program that `run` has started: install the guard, and report at the end.

What scans, renders and sends the last report is loaded before the program runs.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from closewait_guard import _api
from closewait_guard._capture import patch
from closewait_guard._clock import now
from closewait_guard._delivery import print_text
from closewait_guard._format import escape_control
from closewait_guard._guard import Guard
from closewait_guard._preload.status import MAX_REPORT, ChildConfig, Line, prints_json
from closewait_guard._render import render_report, to_dict, with_fewer_examples
from closewait_guard._signal import (
    EarlyLooks,
    SuddenEnd,
    before_sudden_end,
    check_at_end,
    delayed_sigterm,
)
from closewait_guard._stream import layout_of, print_error, write_text
from closewait_guard.model import Report, Reporter, Verdict
from closewait_guard.settings import Settings

__all__ = ["start"]


_HELPERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")


def start() -> None:
    """Guard this process and those that it forks; whatever goes wrong, the program runs."""
    line: Line | None = None
    try:
        config = ChildConfig.from_environment(os.environ)
        line = _line(config)
        # One of our own: the program may install the process-wide one, with its own settings.
        guard = Guard(Settings.load(), _reporters(config)).install()
        guard._attribute_on_import(config.attribute)
        status = Status(line, is_helper=_is_helper())
    except Exception as error:
        print_error(f"process {os.getpid()} is not guarded: {error}")
        if line is not None:
            with suppress(OSError):
                line.say(f"unguarded {escape_control(str(error))}")
        return
    _api.read_records_of(guard)
    reporters = config.reporters or guard.settings.reporters
    ending = _Ending(guard, status, prints_text=not prints_json(reporters))
    # Before all that the program registers, and so called after all of that.
    atexit.register(ending)
    _in_forked_children(ending, status)
    _listen(guard, is_helper=status.is_helper)
    if reporters:
        guard._pipeline.print_on_signal = partial(_report_on_signal, guard, reporters)
    if guard.settings.at_exit:
        guard._record_states_by(partial(_send_state, status))
    if reporters or config.has_metrics:
        from closewait_guard._monitor import Monitor

        # As text the last report comes from us.
        at_exit = guard.settings.at_exit and not {"text", "console"}.issuperset(reporters)
        is_wanted = partial(_is_of_interest, status)
        Monitor(guard, at_exit=at_exit, in_children=True, is_wanted=is_wanted).start()


def _listen(guard: Guard, *, is_helper: bool) -> None:
    """Have the process answer `report`, unless that is turned off; where it cannot, it runs on."""
    if not guard.settings.control and guard.settings.is_given("control"):
        return
    from closewait_guard._remote import Control, RemoteError

    try:
        Control(guard).start(in_children_only=is_helper)
    except RemoteError as error:
        if guard.settings.control:
            print_error(f"process {os.getpid()} has no control socket: {error}")


def _report_on_signal(guard: Guard, reporters: tuple[str, ...], report: Report) -> None:
    """Call the reporters, and print the text unless one does, or writes JSON to stderr."""
    if guard._delivery is not None:
        guard._delivery.deliver(report)
    if not prints_json(reporters) and not any(_PRINTS_TEXT.search(name) for name in reporters):
        print_text(report)


_PRINTS_TEXT = re.compile(r"(^|:)(text|console)(:all)?$")


def _send_state(status: Status, report: Report) -> None:
    """For the launcher to print if this process ends without a last report."""
    status.send_state(as_text(_without_open(report)))


def _line(config: ChildConfig) -> Line | None:
    if config.channel is None:
        return None
    is_main = ChildConfig.is_main(os.environ, os.getpid())
    return Line(config.channel, is_main=is_main, is_helper=_is_helper())


def _is_helper() -> bool:
    """Whether this process only starts or counts others for `multiprocessing`."""
    command = " ".join(sys.orig_argv)
    return any(name in command for name in _HELPERS)


def _reporters(config: ChildConfig) -> list[Reporter | str]:
    """Text goes to stderr itself, not to what the program puts in its place, such as a logger."""
    if "text" not in config.reporters:
        return list(config.reporters)
    from closewait_guard.reporters import text

    return [text(sys.__stderr__) if name == "text" else name for name in config.reporters]


def _is_of_interest(status: Status, report: Report) -> bool:
    """Whether to say more of a process than that it has not leaked."""
    if report.findings or report.alerts or ChildConfig.is_main(os.environ, os.getpid()):
        return True
    return bool(report.open_sockets or report.coverage.opened) and not status.is_helper


class _Ending:
    """The last report of a process, when all that the program does at exit is done."""

    def __init__(self, guard: Guard, status: Status, *, prints_text: bool) -> None:
        self._guard = guard
        self._prints_text = prints_text
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
        return check_at_end(lambda: self._guard._pipeline.check(0, is_last=True))

    def _report(self, scan: Callable[[], Report], *, is_exec: bool = False) -> None:
        try:
            report = self._without_copies(self._looks.add_closed_by_end(scan()))
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self._status.end(f"failed {escape_control(why)}", is_exec=is_exec)
            print_error(f"process {os.getpid()} cannot report: {why}")
            return
        is_silent = self._is_bystander() or self._status.is_helper
        is_wanted = self._guard.settings.at_exit and (bool(report.leaks) or not is_silent)
        pipeline, shown = self._guard._pipeline, _without_open(report)
        shown = pipeline.with_open_at_end(shown) if is_wanted else shown
        text = as_text(shown) if is_wanted else ""
        self._status.note_unread(pipeline.children.unread)
        unseen = (*pipeline.unseen(), *self._looks.failures)
        is_printed = self._status.end(_verdict(report, unseen), text, is_exec=is_exec)
        if is_wanted and self._prints_text and not is_printed:
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


def _verdict(report: Report, unseen: Iterable[str]) -> str:
    """What is reported to the launcher: what could not be looked at may have leaked."""
    # Of those that were dropped, no record may be left.
    if report.leaks or report.coverage.forgotten:
        return "leaked"
    why = "; ".join(unseen)
    return f"failed {escape_control(why)}" if why else "clean"


def _without_open(report: Report) -> Report:
    wrong = tuple(leak for leak in report.findings if leak.verdict is not Verdict.OPEN)
    return replace(report, findings=wrong)


def _print_report(report: Report) -> None:
    """Without a launcher: the program itself always; a child of it only when it has leaked."""
    if report.leaks or ChildConfig.is_main(os.environ, os.getpid()):
        write_text(sys.__stderr__, render_report(report, layout_of(sys.__stderr__)))


def _in_forked_children(ending: _Ending, status: Status) -> None:
    def in_child() -> None:
        ending.after_fork()
        with suppress(Exception):
            status.after_fork()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=in_child)


def as_text(report: Report) -> str:
    """As JSON in one line, with fewer examples of each site the longer it is."""
    text = ""
    for shorter in with_fewer_examples(report):
        text = json.dumps(to_dict(shorter), separators=(",", ":"))
        if len(text) <= MAX_REPORT:
            break
    return text


class Status:
    """Waits for the first socket to be created: what has never opened one has nothing to leak.

    Args:
        line: The line to the launcher, if that waits for what is said.
        is_helper: This process only starts or counts others.

    Attributes:
        is_helper: The same; not so in a forked child.
        has_opened: Whether this process has opened a socket, in a forked child since the fork.
        has_ended: Whether it has been said how this process ends.
    """

    def __init__(self, line: Line | None, *, is_helper: bool = False) -> None:
        self._line = line
        self.is_helper = is_helper
        self.has_opened = self.has_ended = False
        patch.subscribe(self)

    def on_create(self, sock: socket.socket, descriptor: object, /) -> None:  # noqa: ARG002
        patch.try_unsubscribe(self)
        if not self.has_opened:
            self.has_opened = True
            if self._line is not None:
                # If that cannot be said, nor can the verdict; then that is reported.
                with suppress(OSError):
                    self._line.say("opened")

    def on_detach(self, sock: socket.socket, fd: int, /) -> None:
        """Nothing to report."""

    def on_makefile(self, sock: socket.socket, /) -> None:
        """Nothing to report."""

    def on_finalize(self, sock: socket.socket, fd: int, /) -> None:
        """Nothing to report."""

    def on_close_in_collection(self, sock: socket.socket, fd: int, /) -> None:
        """Nothing to report."""

    def on_fd_exhausted(self) -> None:
        """Nothing to report."""

    def on_error(self) -> None:
        """Nothing to report: the launcher will miss the verdict."""

    def send_state(self, report: str) -> None:
        """Send a report that is not the last, unless that has been sent."""
        if self._line is not None and not self.has_ended:
            with suppress(OSError):
                self._line.send_report(report)

    def note_unread(self, pids: Iterable[int]) -> None:
        """Say which child processes may keep open what this one has closed."""
        if self._line is not None and (named := " ".join(map(str, pids))):
            with suppress(OSError):
                self._line.say(f"unread {named}")

    def end(self, verdict: str, report: str = "", *, is_exec: bool = False) -> bool:
        """Say how this program ends; whether the launcher has got the report, and prints it.

        Args:
            verdict: Whether it has leaked.
            report: Its last report.
            is_exec: Another program takes its place in this process.
        """
        self.has_ended = True
        if self._line is None:
            return False
        try:
            if report:
                self._line.send_report(report)
            self._line.say(f"replaced {verdict}" if is_exec else verdict)
        except OSError as error:
            # It may have begun when the program had ended. Then it had nothing to leak.
            if verdict != "clean" or (self.has_opened and not self.is_helper):
                why = f"cannot report to `closewait-guard run` whether it has leaked: {error}"
                print_error(f"process {os.getpid()} {why}")
            return False
        if not is_exec:
            with suppress(OSError):
                self._line.wait_for_launcher()
        return True

    def resume(self) -> None:
        """Say that the end has failed, and this program goes on."""
        if self.has_ended:
            self.has_ended = False
            if self._line is not None:
                with suppress(OSError):
                    self._line.say("resumed")

    def after_fork(self) -> None:
        """In the child."""
        self.has_opened = self.has_ended = self.is_helper = False
        patch.subscribe(self)
        if self._line is not None:
            self._line.after_fork()
