"""Ask a running process for one report from inside: the folder that both see, and the answer."""

from __future__ import annotations

import os
import secrets
import select
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple, Self

from closewait_guard._remote import injected
from closewait_guard._remote.injection import (
    GDB,
    REMOTE_EXEC,
    choose_method,
    inject_by_gdb,
    inject_by_remote_exec,
)
from closewait_guard._remote.place import ask_control, has_control
from closewait_guard._remote.target import NotPythonError, Target, describe_wait, inspect_target
from closewait_guard._remote.wire import Listener, RemoteError
from closewait_guard._render import from_dict
from closewait_guard._threads import descendants_of
from closewait_guard.exceptions import CloseWaitGuardError
from closewait_guard.model import Report

__all__ = [
    "Answer",
    "Found",
    "ask",
    "find_targets",
]


_MAX_PROCESSES = 10_000
# Each has a gdb of its own, and waits for a main thread.
_AT_ONCE = 8
_PACKAGE = Path(__file__).parents[1]
_MAX_SECONDS_OF_SCAN = 60.0
# What a scan needs, and some that other threads may take meanwhile.
_DESCRIPTORS = 32
_FOLDERS = ("tmp", "var/tmp", "dev/shm")


class Answer(NamedTuple):
    """What a process has answered.

    Attributes:
        pid: The process, by the number that it has here.
        report: What its guard has found, or one that was there for the time of the scan.
        pause: For how many seconds it was stopped; 0.0 where it was not.
        seconds: How long the scan took there, beside its own threads; None where its guard has
            answered through its control socket.
        reached_limit: How many descriptors it may have, where it was let have more for the scan.
    """

    pid: int
    report: Report
    pause: float
    seconds: float | None
    reached_limit: int | None


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
        return Found([inspect_target(pid)], [])
    targets, failures = list[Target](), list[str]()
    for each in (pid, *descendants_of(pid, _MAX_PROCESSES)):
        try:
            target = inspect_target(each)
            if not target.is_resource_tracker:
                targets.append(target)
        except NotPythonError:
            continue
        except RemoteError as error:
            failures.append(str(error))
    if not targets and not failures:
        raise NotPythonError(f"neither process {pid} nor any below it is a Python process")
    return Found(targets, failures)


def ask(
    targets: Sequence[Target], wanted: str, timeout: float, thresholds: Mapping[str, object]
) -> tuple[list[Answer], list[str]]:
    """Ask processes for their reports; return the answers, and a sentence for each that has none.

    Args:
        targets: The processes.
        wanted: The method, or `auto`.
        timeout: Seconds that a main thread may take until it runs Python code.
        thresholds: Settings for the scan, where a process has no guard of its own.
    """
    answers, failures = list[Answer](), list[str]()
    is_cancelled = Event()
    requests = [_Request(each, thresholds, is_cancelled) for each in targets]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for each in [pool.submit(_ask, each, wanted, timeout) for each in requests]:
                try:
                    answers.append(each.result())
                except CloseWaitGuardError as error:
                    failures.append(str(error))
        finally:
            # By Ctrl-C: each takes its request back. The pool does not know of a thread that was
            # about to start.
            is_cancelled.set()
            for request in requests:
                with request.lock:
                    continue
    return answers, failures


def _ask(request: _Request, wanted: str, timeout: float) -> Answer:
    """Ask one, unless that is cancelled; where there is no answer, the request is taken back."""
    with request.lock:
        if request.is_cancelled.is_set():
            raise RemoteError(f"{request.target.name} was not asked")
        return _make_and_receive(request, wanted, timeout)


def _make_and_receive(request: _Request, wanted: str, timeout: float) -> Answer:
    target = request.target
    if wanted == "auto" and (answer_of_control := _ask_control(target.pid, timeout)) is not None:
        return answer_of_control
    method = choose_method(target, wanted)
    try:
        with request:
            pause = request.make(method)
            try:
                request.receive(timeout)
            except _NotYetError:
                request.take_back(method)
                raise RemoteError(_why_not(target, timeout)) from None
            answer = request.receive(_MAX_SECONDS_OF_SCAN)
    except OSError as error:
        # It may have ended at any moment.
        raise RemoteError(f"{target.name} cannot be asked: {error}") from None
    if "report" not in answer:
        raise RemoteError(f"the scan in {target.name} has failed: {answer.get('error')}")
    seconds = answer.get("seconds")
    took = seconds if isinstance(seconds, float) else 0.0
    report = from_dict(answer["report"])
    return Answer(target.pid, report, pause, took, request.reached_limit)


def _ask_control(pid: int, timeout: float) -> Answer | None:
    """The answer of a guard that listens, also while the main thread is stuck; None without one."""
    if not has_control(pid):
        return None
    try:
        report = from_dict(ask_control(pid, {"request": "report"}, timeout)["report"])
    except (CloseWaitGuardError, LookupError):
        # By the other way it may still be had.
        return None
    return Answer(pid, report, 0.0, None, None)


class _NotYetError(RemoteError):
    """Nothing has come in time."""


def _why_not(target: Target, timeout: float) -> str:
    try:
        doing = describe_wait(target.pid)
    except OSError:
        return f"{target.name} has ended meanwhile"
    return (
        f"the main thread of {target.name} ran no Python code for {timeout:g} s ({doing}); the "
        "request is taken back. Ask again while it has something to do, or with a longer --timeout"
    )


class _Request:
    """The folder of a request, with its script and its socket; gone in the end.

    Its owner is the user of the process, and no one else may enter it.
    """

    def __init__(
        self, target: Target, thresholds: Mapping[str, object], is_cancelled: Event
    ) -> None:
        self.target, self._thresholds = target, dict(thresholds)
        self.is_cancelled, self.lock = is_cancelled, Lock()
        self.reached_limit: int | None = None
        self._token = f"#{secrets.token_hex(16)}"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.reached_limit = stack.enter_context(_room_for_descriptors(self.target.pid))
            self._process = stack.enter_context(_process_end(self.target.pid))
            self._folder, self._inside = stack.enter_context(_shared_folder(self.target))
            self._listener = stack.enter_context(Listener(str(self._folder / "socket")))
            self._write_script()
            self._give_away()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def _write_script(self) -> None:
        package = str(_PACKAGE)
        if self.target.is_apart or self.target.uid != os.geteuid():
            # The process may not see it, or not be allowed to.
            ignore = shutil.ignore_patterns("pytest_plugin", "commands", "_preload")
            shutil.copytree(_PACKAGE, self._folder / _PACKAGE.name, ignore=ignore)
            package = f"{self._inside}/{_PACKAGE.name}"
        source = Path(injected.__file__).read_text(encoding="utf-8")
        call = f"begin({package!r}, {self._inside + '/socket'!r}, {self._thresholds!r})"
        script = f"{self._token}\n{source}\n{call}\n"
        (self._folder / "script.py").write_text(script, encoding="utf-8")

    def _give_away(self) -> None:
        if self.target.uid != os.geteuid():
            for path in (self._folder, *self._folder.rglob("*")):
                os.chown(path, self.target.uid, -1)

    def make(self, method: str) -> float:
        """Have the process run the script soon; return for how long it was stopped."""
        script = f"{self._inside}/script.py"
        try:
            if method == GDB:
                return inject_by_gdb(self.target, script, self._token, self._folder)
            inject_by_remote_exec(self.target, script)
        except RemoteError:
            self._require_running()
            raise
        return 0.0

    def _require_running(self) -> None:
        if self._process is not None and select.select([self._process], [], [], 0)[0]:
            raise RemoteError(f"{self.target.name} has ended meanwhile")

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next message of the process.

        Raises:
            RemoteError: It has ended, sends something else, or nothing in that time.
        """
        end = time.monotonic() + timeout
        while not self._listener.wait(min(0.05, max(0.0, end - time.monotonic()))):
            self._require_running()
            if time.monotonic() >= end or self.is_cancelled.is_set():
                raise _NotYetError(f"{self.target.name} did not answer within {timeout:g} s")
        with self._listener.accept(1) as connection:
            connection.require_peer(users={self.target.uid}, pid=self.target.pid)
            return connection.receive(max(1.0, end - time.monotonic()))

    def take_back(self, method: str) -> None:
        """What runs late must find nothing to do: no file, or one that is empty."""
        if method == REMOTE_EXEC:
            # The interpreter would complain of a missing file.
            with suppress(RemoteError):
                inject_by_remote_exec(self.target, os.devnull)


@contextmanager
def _room_for_descriptors(pid: int) -> Iterator[int | None]:
    """Let a process that has reached its limit of descriptors open a few more for this long.

    Yields what the limit is otherwise, where it was raised.
    """
    # Not everywhere, where a sentence is to say so.
    import resource

    soft = hard = resource.RLIM_INFINITY
    with suppress(PermissionError):
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    if soft == resource.RLIM_INFINITY or used + _DESCRIPTORS < soft:
        yield None
        return
    raised = soft + _DESCRIPTORS
    with suppress(OSError, ValueError):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (raised, max(raised, hard)))
    try:
        yield soft
    finally:
        with suppress(OSError, ValueError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def _process_end(pid: int) -> Iterator[int | None]:
    """A descriptor that is readable when a process has ended; None where there is none."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _shared_folder(target: Target) -> Iterator[tuple[Path, str]]:
    """A folder of its own below the root directory of a process: for us, and as it sees it."""
    parent, seen = _open_parent(target)
    name = f"closewait-guard-{target.pid}-{secrets.token_hex(8)}"
    # By the descriptor it is found after the process has ended, too; by gdb as well.
    folder = Path(f"/proc/{os.getpid()}/fd/{parent}", name)
    try:
        folder.mkdir(mode=0o700)
        try:
            yield folder, f"{seen}/{name}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(parent)


def _open_parent(target: Target) -> tuple[int, str]:
    for name in _FOLDERS:
        path = f"/proc/{target.pid}/root/{name}"
        if os.access(path, os.W_OK | os.X_OK):
            return os.open(path, os.O_PATH | os.O_DIRECTORY), f"/{name}"
    raise RemoteError(f"none of /tmp, /var/tmp and /dev/shm of {target.name} can be written to")
