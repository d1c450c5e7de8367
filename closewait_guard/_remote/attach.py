"""Ask running processes from inside: for one report, for a watch, or to keep a guard."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple, Self, TypeVar

from closewait_guard._format import pluralize
from closewait_guard._remote.injection import REMOTE_EXEC, choose_method, only_request
from closewait_guard._remote.place import ask_control, has_control
from closewait_guard._remote.request import NotYetError, Request, room_for_descriptors
from closewait_guard._remote.target import (
    NotPythonError,
    Target,
    describe_wait,
    inspect_target,
    may_leak,
)
from closewait_guard._remote.wire import RemoteError
from closewait_guard._render import from_dict
from closewait_guard._threads import descendants_of
from closewait_guard.exceptions import CloseWaitGuardError
from closewait_guard.model import Report

__all__ = [
    "Answer",
    "Found",
    "Reached",
    "ask",
    "change",
    "find_targets",
    "pythons_below",
    "watch_processes",
]


_MAX_PROCESSES = 10_000
# Each has a gdb of its own, and waits for a main thread.
_AT_ONCE = 8
_MAX_SECONDS_OF_SCAN = 60.0
_PAUSE = 0.1
_Result = TypeVar("_Result")


class Reached(NamedTuple):
    """A process that has done what it was asked for.

    Attributes:
        pid: The process, by the number that it has here.
        pause: For how many seconds it was stopped; 0.0 where it was not.
        seconds: How long that took there, beside its own threads; None where its guard has
            answered through its control socket.
        reached_limit: How many descriptors it may have, where it was let have more for that.
        had_guard: A guard was there already.
    """

    pid: int
    pause: float = 0.0
    seconds: float | None = None
    reached_limit: int | None = None
    had_guard: bool = False


class Answer(NamedTuple):
    """What a process has answered.

    Attributes:
        process: Which, and what it has cost.
        report: What its guard has found, or one that was there for the time of the scan.
        first: Of a watch, what it had found at the beginning.
    """

    process: Reached
    report: Report
    first: Report | None = None


class Found(NamedTuple):
    """Processes that may be asked, and why others may not be."""

    targets: Sequence[Target]
    failures: Sequence[str]


def find_targets(pid: int, *, tree: bool) -> Found:
    """A process; and the Python processes below it, if they are asked for.

    Raises:
        RemoteError: There is none that may be asked.
    """
    if not tree:
        try:
            return Found([inspect_target(pid)], [])
        except NotPythonError as error:
            if below := len(pythons_below(pid)):
                found = pluralize(below, "Python process")
                raise NotPythonError(f"{error}. Add --tree to ask the {found} below it") from None
            raise
    targets, failures = list[Target](), list[str]()
    for each in (pid, *descendants_of(pid, _MAX_PROCESSES)):
        if each == os.getpid():
            continue
        try:
            target = inspect_target(each)
            if each == pid or not target.is_helper:
                targets.append(target)
        except NotPythonError:
            continue
        except RemoteError as error:
            failures.append(str(error))
    if not targets and not failures:
        raise NotPythonError(f"neither process {pid} nor any below it is a Python process")
    return Found(targets, failures)


def pythons_below(pid: int) -> set[int]:
    """The Python processes below a process that may leak."""
    return set(filter(may_leak, descendants_of(pid, _MAX_PROCESSES)))


def ask(
    targets: Sequence[Target], method: str, timeout: float, settings: Mapping[str, object]
) -> tuple[list[Answer], list[str]]:
    """Ask processes for their reports; return the answers, and a sentence for each that has none.

    Args:
        targets: The processes.
        method: How to have them run code, or `auto`.
        timeout: Seconds that a main thread may take until it runs Python code.
        settings: For the guard, where a process has none of its own.
    """
    with _Visits(targets, {"what": "scan", "settings": settings}, method, timeout) as visits:
        return visits.call(_Visit.look, visits.all)


def watch_processes(
    targets: Sequence[Target],
    method: str,
    timeout: float,
    settings: Mapping[str, object],
    seconds: float,
    announce: Callable[[int], None],
) -> tuple[list[Answer], list[str]]:
    """Have a guard in processes for a while, until Ctrl-C, or until all of them have ended.

    What one that ends meanwhile had answered at the beginning counts, and a sentence says so.

    Args:
        targets: As for `ask`, like the method, the timeout and the settings.
        method: The same.
        timeout: The same.
        settings: The same.
        seconds: How long.
        announce: Called when they are in, with the number of processes.
    """
    order = {"what": "watch", "settings": settings, "seconds": seconds}
    with _Visits(targets, order, method, timeout) as visits:
        first, failures = visits.call(_Visit.look, visits.all)
        if not first:
            return [], failures
        begun = [visit for visit in visits.all if visit.has_begun]
        with suppress(KeyboardInterrupt):
            announce(len(begun))
            _pause(begun, seconds)
        last, more = visits.call(_Visit.look_again, begun)
    latest = {each.process.pid: each for each in first} | {each.process.pid: each for each in last}
    return list(latest.values()), failures + more


def _pause(visits: Sequence[_Visit], seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and any(visit.is_running for visit in visits):
        time.sleep(min(_PAUSE, left))


def change(
    targets: Sequence[Target], method: str, timeout: float, order: Mapping[str, object]
) -> tuple[list[Reached], list[str]]:
    """Leave a guard in processes that have none, or take it out; the rest as for `ask`.

    Args:
        targets: As for `ask`, like the method and the timeout.
        method: The same.
        timeout: The same.
        order: What to do: see `inside.py`.
    """
    with _Visits(targets, order, method, timeout) as visits:
        return visits.call(_Visit.do, visits.all)


class _Visits:
    """Several processes at once. In the end, whatever ends it, nothing is left in any of them."""

    def __init__(
        self, targets: Sequence[Target], order: Mapping[str, object], method: str, timeout: float
    ) -> None:
        self._is_cancelled = Event()
        self.all = [_Visit(each, order, method, timeout, self._is_cancelled) for each in targets]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        for visit in self.all:
            visit.end()

    def call(
        self, function: Callable[[_Visit], _Result], visits: Iterable[_Visit]
    ) -> tuple[list[_Result], list[str]]:
        """What the function returns of each, and a sentence for each that has failed."""
        results, failures = list[_Result](), list[str]()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                for each in [pool.submit(visit.call, function) for visit in visits]:
                    try:
                        results.append(each.result())
                    except CloseWaitGuardError as error:
                        failures.append(str(error))
            except BaseException:
                # By Ctrl-C: each takes its request back. The pool does not know of a thread that
                # was about to start.
                self._is_cancelled.set()
                for visit in self.all:
                    with visit.lock:
                        continue
                raise
        return results, failures


class _Visit:
    """What one process is asked. Of a watch the request stays open until the end."""

    def __init__(
        self,
        target: Target,
        order: Mapping[str, object],
        method: str,
        timeout: float,
        is_cancelled: Event,
    ) -> None:
        self.lock = Lock()
        self.has_begun = False
        self._target, self._order, self._wanted, self._timeout = target, order, method, timeout
        self._is_cancelled = is_cancelled
        self._request: Request | None = None
        self._process = Reached(target.pid)
        self._first: Report | None = None

    def call(self, function: Callable[[_Visit], _Result]) -> _Result:
        """Call a function for it, unless all is cancelled."""
        with self.lock:
            if self._is_cancelled.is_set():
                raise RemoteError(f"{self._target.name} was not asked")
            try:
                return function(self)
            except OSError as error:
                # It may have ended at any moment.
                if isinstance(error, ProcessLookupError) or not self.is_running:
                    raise RemoteError(f"{self._target.name} has ended meanwhile") from None
                raise RemoteError(f"{self._target.name} cannot be asked: {error}") from None
            finally:
                # What runs late must find nothing.
                if self._order["what"] != "watch" or not self.has_begun:
                    self.end()

    def look(self) -> Answer:
        """Its report; of a watch the first."""
        report = self._ask_control()
        if report is None:
            report = self._report_in(self._begin())
        self.has_begun, self._first = True, report
        return Answer(self._process, report)

    def look_again(self) -> Answer:
        """Its report at the end of a watch."""
        request = self._request
        if request is None:
            report = self._ask_control()
            if report is None:
                raise RemoteError(f"{self._target.name} answers no more")
        else:
            with room_for_descriptors(self._target.pid):
                request.end_watch()
                report = self._report_in(request.receive(_MAX_SECONDS_OF_SCAN))
        return Answer(self._process, report, self._first)

    def do(self) -> Reached:
        """Whatever else is asked of it."""
        if self._order["what"] == "install" and self._ask_control() is not None:
            return self._process
        message = self._begin()
        if "error" in message:
            raise RemoteError(f"{self._target.name}: {message['error']}")
        return self._process

    def end(self) -> None:
        """Let go of the request; a guard that is in for a while goes with it. Idempotent."""
        request, self._request = self._request, None
        if request is not None:
            request.__exit__()

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        if self._request is not None:
            return self._request.is_running
        return Path(f"/proc/{self._target.pid}").exists()

    def _ask_control(self) -> Report | None:
        """The report of a guard that listens, also while the main thread is stuck; else None."""
        pid = self._target.pid
        if self._wanted != "auto" or not has_control(pid):
            return None
        try:
            report = from_dict(ask_control(pid, {"request": "report"}, self._timeout)["report"])
        except (CloseWaitGuardError, LookupError):
            # By the other way it may still be had.
            return None
        self._process = Reached(pid, had_guard=True)
        return report

    def _begin(self) -> dict[str, Any]:
        """The first message that the process has in answer."""
        target = self._target
        method = choose_method(target, self._wanted)
        with room_for_descriptors(target.pid) as reached_limit:
            with only_request(target) if method == REMOTE_EXEC else nullcontext():
                request, pause = self._make_request(method)
            message = request.receive(_MAX_SECONDS_OF_SCAN)
        seconds, had_guard = message.get("seconds"), message.get("had_guard") is True
        took = seconds if isinstance(seconds, float) else 0.0
        self._process = Reached(target.pid, pause, took, reached_limit, had_guard)
        return message

    def _make_request(self, method: str) -> tuple[Request, float]:
        """Have the process begin; return what it answers by, and for how long it was stopped."""
        target = self._target
        self._request = request = Request(target, self._order, self._is_cancelled).__enter__()
        pause = request.make(method)
        try:
            request.receive(self._timeout)
        except NotYetError:
            request.take_back(method)
            raise RemoteError(_why_not(target, self._timeout)) from None
        return request, pause

    def _report_in(self, message: Mapping[str, Any]) -> Report:
        if "report" not in message:
            why = message.get("error")
            raise RemoteError(f"the scan in {self._target.name} has failed: {why}")
        return from_dict(message["report"])


def _why_not(target: Target, timeout: float) -> str:
    try:
        doing = describe_wait(target.pid)
    except OSError:
        return f"{target.name} has ended meanwhile"
    return (
        f"the main thread of {target.name} ran no Python code for {timeout:g} s ({doing}); the "
        "request is taken back. Ask again while it has something to do, or with a longer --timeout"
    )
