"""The Python processes that a program starts, seen from outside: which of them are not guarded.

A Python with -I, -E or -S, or with another environment, runs no line of ours, and cannot say so.
The kernel reports that an interpreter's file is opened, as it is for each start; then /proc has the
processes below the program, with their arguments and environment. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from closewait_guard._format import escape_control
from closewait_guard._preload import FOLDER

__all__ = [
    "PythonProcesses",
    "missing_guard",
    "shares_stderr",
]


_INTERPRETER = re.compile(r"(python|pypy)[\d.]*t?")
_MAX_PROGRAMS = 100_000
_MAX_COMMAND = 60
_IN_OPEN = 0x20
# From an event to looks: at first the process is not Python yet.
_DELAYS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)
_SECONDS_WITHOUT_EVENTS = 0.02
# A process that was forked, and is still what its parent is.
_PF_FORKNOEXEC = 0x40
_WITHOUT_PATH = "its environment does not have the PYTHONPATH of `run`"
_SHADOWED = "another sitecustomize stands before that of `run` on its PYTHONPATH"


class _Program(NamedTuple):
    """A program that a process runs: `exec` puts another in its place.

    Attributes:
        pid: The process.
        started: When the process began, in ticks of the kernel.
        stack: Where its stack begins: not the same in the next program. 0 where that is hidden.
    """

    pid: int
    started: int
    stack: int


class _Start(NamedTuple):
    """How a Python was started; empty while the kernel is still about to fill that in."""

    arguments: tuple[str, ...]
    missing: str | None


class PythonProcesses:
    """Notes the Python processes of a program, for as long as they run.

    Args:
        command: What will be run.
        token: What the environment of guarded processes has.
    """

    def __init__(self, command: Sequence[str], token: str) -> None:
        self._token = token
        self._found: dict[_Program, _Start] = {}
        self._due: list[float] = []
        # Until the program takes the launcher's place, that is Python too.
        self._own = None
        with suppress(OSError):
            self._own, _ = _program_of(os.getpid())
        self._inotify = _watch_files(_interpreters(command))

    def fileno(self) -> int:
        """What becomes readable when a Python may have been started; -1 if nothing does."""
        return self._inotify

    def close(self) -> None:
        """Let go of it."""
        if self._inotify >= 0:
            os.close(self._inotify)
            self._inotify = -1

    def take_events(self) -> None:
        """After it has become readable."""
        with suppress(OSError):
            os.read(self._inotify, 65536)
        now = time.monotonic()
        self._due = [now + delay for delay in _DELAYS]

    def limit(self, timeout: float | None) -> float | None:
        """How long to wait at most, because it is time to look then."""
        if not self._due and self._inotify >= 0:
            return timeout
        wait = _SECONDS_WITHOUT_EVENTS
        if self._due:
            wait = max(0.0, self._due[0] - time.monotonic())
        return wait if timeout is None else min(wait, timeout)

    def look_if_due(self, root: int) -> None:
        """Look at the processes below the program, if there may be another."""
        now = time.monotonic()
        if self._inotify < 0 or (self._due and self._due[0] <= now):
            self._due = [at for at in self._due if at > now]
            self.look(root)
            if self._inotify >= 0 and not self._due:
                self.find_running()

    def look(self, root: int) -> None:
        """Note each Python among a process and all below it."""
        for pid in _family_of(root):
            with suppress(OSError, ValueError, IndexError):
                self._note(pid)

    def find_running(self) -> set[int]:
        """Those with a guard that run now; each without one is noted.

        A daemon is not below the program any more: its parent has ended. It still has the token,
        which is looked for in all processes.
        """
        found = _pythons_with(self._token)
        for pid in found:
            with suppress(OSError, ValueError, IndexError):
                self._note(pid)
        return found - self.unguarded().keys()

    def _note(self, pid: int) -> None:
        program, is_fork = _program_of(pid)
        known = self._found.get(program)
        if is_fork or program == self._own or (known is not None and known.arguments):
            return
        if not _is_interpreter(Path(f"/proc/{pid}/exe").readlink().name):
            return
        # Empty until the environment is there too.
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
        arguments = tuple(os.fsdecode(part) for part in data.split(b"\0")[:-1])
        environ = Path(f"/proc/{pid}/environ").read_bytes() if arguments else b""
        missing = missing_guard(arguments, environ, self._token) if arguments else None
        if missing is not None or len(self._found) < _MAX_PROGRAMS:
            self._found[program] = _Start(arguments, missing)

    def unguarded(self) -> dict[int, str]:
        """The processes that are Python without a guard, and why."""
        return {
            program.pid: f"{start.missing}{_shown(start.arguments)}"
            for program, start in self._found.items()
            if start.missing is not None
        }


def _program_of(pid: int) -> tuple[_Program, bool]:
    """What a process runs, and whether it has only been forked and runs what its parent does."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    flags, started, stack = int(fields[6]), int(fields[19]), int(fields[25])
    return _Program(pid, started, stack), bool(flags & _PF_FORKNOEXEC)


def _shown(arguments: Sequence[str]) -> str:
    command = escape_control(shlex.join(arguments))
    if len(command) > _MAX_COMMAND:
        command = command[: _MAX_COMMAND - 3] + "..."
    return f" ({command})"


def missing_guard(arguments: Sequence[str], environ: bytes, token: str) -> str | None:
    r"""Why a Python that is started so imports nothing of ours; None if it does.

    Example:
        >>> missing_guard(["python", "-Wd", "-Ic", "pass"], b"A=abc", "abc")
        'it has -I'
        >>> missing_guard(["python", "-c", "pass"], b"A=b", "abc")
        'its environment does not have the PYTHONPATH of `run`'
        >>> path = b"PYTHONPATH=" + FOLDER.encode()
        >>> missing_guard(["python", "-m", "app", "-I"], path + b"\0A=abc", "abc")
    """
    flag = next((flag for flag in _flags(arguments) if flag in "IES"), None)
    if flag is not None:
        return f"it has -{flag}"
    path = next((each for each in environ.split(b"\0") if each.startswith(b"PYTHONPATH=")), b"")
    before, ours, _ = path.partition(b"=")[2].partition(os.fsencode(FOLDER))
    if token.encode() not in environ or not ours:
        return _WITHOUT_PATH
    if any(
        Path(os.fsdecode(each), "sitecustomize.py").exists() for each in before.split(b":")[:-1]
    ):
        return _SHADOWED
    return None


def _flags(arguments: Sequence[str]) -> Iterator[str]:
    """The letters of the options that are the interpreter's own."""
    rest = iter(arguments[1:])
    for argument in rest:
        if not argument.startswith("-") or argument in ("-", "--"):
            return
        if argument.startswith("--"):
            if argument == "--check-hash-based-pycs":
                next(rest, None)
            continue
        for place, letter in enumerate(argument[1:], 1):
            if letter in "cm":
                return
            if letter in "WX":
                if place == len(argument) - 1:
                    next(rest, None)
                break
            yield letter


def _pythons_with(token: str) -> set[int]:
    """The Python processes that were started with the token, as far as may be seen."""
    found = set()
    with suppress(OSError):
        for process in Path("/proc").iterdir():
            if process.name.isdecimal():
                with suppress(OSError):
                    is_python = _is_interpreter((process / "exe").readlink().name)
                    if is_python and token.encode() in (process / "environ").read_bytes():
                        found.add(int(process.name))
    return found


def shares_stderr(pid: int) -> bool:
    """Whether a process has this one's standard error: a service goes on without it."""
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/fd/2"), os.fstat(2))  # noqa: PTH116
    except OSError:
        return False


def _is_interpreter(name: str) -> bool:
    return "python" in name or "pypy" in name


def _family_of(root: int) -> Iterator[int]:
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        with suppress(OSError, ValueError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with suppress(OSError):
                    waiting += map(int, (thread / "children").read_bytes().split())


def _interpreters(command: Sequence[str]) -> Iterator[Path]:
    """The interpreters that may be started: of this environment, the program's, and the PATH's."""
    program = shutil.which(command[0])
    folders = [Path(sys.executable).parent, Path(sys.base_exec_prefix, "bin")]
    if program is not None:
        folders += [Path(program).parent, Path(program).resolve().parent]
    folders += [Path(folder) for folder in os.get_exec_path()]
    for folder in dict.fromkeys(folders):
        with suppress(OSError):
            yield from (path for path in folder.iterdir() if _INTERPRETER.fullmatch(path.name))


def _watch_files(paths: Iterator[Path]) -> int:
    """A descriptor that is readable when one of the files has been opened; -1 without inotify."""
    if sys.platform != "linux":
        return -1
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    except (OSError, AttributeError):
        return -1
    real = dict.fromkeys(path.resolve() for path in paths if path.exists())
    watched = [libc.inotify_add_watch(fd, os.fsencode(path), _IN_OPEN) for path in real]
    # One that cannot be watched may be started, too.
    if fd >= 0 and min(watched, default=-1) < 0:
        os.close(fd)
        return -1
    return fd
