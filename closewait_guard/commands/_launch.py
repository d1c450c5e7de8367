"""Start another program in this one's place, or wait for it as if it were this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from closewait_guard._preload import ChildConfig
from closewait_guard._stream import print_error

__all__ = [
    "can_stand_beside",
    "command_of",
    "exec_beside",
    "exec_program",
    "exit_like",
    "run_and_wait",
]


NOT_FOUND, NOT_EXECUTABLE = 127, 126


def command_of(target: Sequence[str]) -> list[str]:
    """The command that TARGET stands for: Python's own for a script and for `-m MODULE`."""
    first = target[0]
    if first == "-m" or _is_script(first):
        return [sys.executable, *target]
    # A program of this environment is meant, where the guard is installed, even if the
    # environment is not on the PATH.
    if first and not os.path.dirname(first):  # noqa: PTH120 - pathlib takes "." for no folder
        beside = Path(sys.executable).with_name(first)
        if beside.is_file():
            return [str(beside), *target[1:]]
    return list(target)


def _is_script(name: str) -> bool:
    path = Path(name)
    if path.suffix in (".py", ".pyw", ".pyz"):
        return True
    if path.is_dir():
        return (path / "__main__.py").is_file()
    return path.is_file() and not os.access(path, os.X_OK)


def exec_program(command: list[str], environ: dict[str, str]) -> int:
    """Go on as the program; comes back only where that cannot be done."""
    if os.name != "posix":
        # Elsewhere another process would take our place, and the shell would not wait for it.
        return subprocess.call(  # noqa: S603 - what the user asks for
            command, env=ChildConfig.mark_main(environ, os.getpid())
        )
    _flush()
    return _exec(command, environ)


def exec_beside(
    command: list[str], environ: dict[str, str], serve: Callable[[int, int], None]
) -> int:
    """Go on as the program, with a process beside it that is no child of it.

    Args:
        command: What to run.
        environ: Its environment.
        serve: Called in that process, with the number of the program's process and a descriptor
            that is readable when that has ended.
    """
    _flush()
    program = os.getpid()
    end = os.pidfd_open(program)
    child = os.fork()
    if not child:
        with suppress(BaseException):
            if not os.fork():
                _leave_to_program()
                serve(program, end)
        os._exit(0)
    os.waitpid(child, 0)
    return _exec(command, environ)


def _leave_to_program() -> None:
    """Be out of the way: of its terminal, its signals, and the readers of its output."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(null, stream)
    os.close(null)
    for path in list(Path("/proc/self/fd").iterdir()):
        # What can be inherited is the program's.
        with suppress(OSError):
            if int(path.name) > sys.stderr.fileno() and os.get_inheritable(int(path.name)):
                os.close(int(path.name))


def can_stand_beside() -> bool:
    """Whether the end of a process that is no child can be noticed here."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _exec(command: list[str], environ: dict[str, str]) -> int:
    _restore_signals()
    try:
        os.execvpe(command[0], command, ChildConfig.mark_main(environ, os.getpid()))  # noqa: S606
    except OSError as error:
        print_error(f"{command[0]}: {error.strerror}")
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _restore_signals() -> None:
    """Python ignores some, and what is ignored stays so in the program that is started."""
    for name in ("SIGPIPE", "SIGXFSZ", "SIGXFZ"):
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, signal.SIG_DFL)


def run_and_wait(
    command: list[str],
    environ: dict[str, str],
    started: Callable[[int], None],
    ended: Callable[[Callable[[], bool]], None],
) -> int:
    """Wait for the program, and hand signals on to it; below zero, the signal that ended it.

    Args:
        command: What to run.
        environ: Its environment.
        started: Called once it has been started, with the number of its process.
        ended: Called once it has ended, with what answers whether to hurry.
    """
    blocked = _HANDED_ON | {signal.SIGCHLD} if _CAN_HAND_ON else set[signal.Signals]()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    _flush()
    pid = os.fork()
    if not pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os._exit(_exec(command, environ))
    started(pid)
    status = _wait_for(pid)
    ended(_is_asked_to_end)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return os.waitstatus_to_exitcode(status)


def _is_asked_to_end() -> bool:
    return _CAN_HAND_ON and signal.sigtimedwait(_ENDING, 0) is not None


_CAN_HAND_ON = hasattr(signal, "sigwaitinfo")
_ENDING = frozenset({signal.SIGTERM, signal.SIGINT})
_HANDED_ON = _ENDING.union(
    {
        signal.Signals[name]
        for name in ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGALRM", "SIGCONT")
        if name in signal.Signals.__members__
    }
)


def _wait_for(pid: int) -> int:
    """The status with which the program has ended."""
    if not _CAN_HAND_ON:
        return os.waitpid(pid, 0)[1]
    while True:
        info = signal.sigwaitinfo(_HANDED_ON | {signal.SIGCHLD})
        if info.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return status
        elif info.si_code <= 0:
            # Sent by a process, to this one. What comes from the terminal comes to both.
            os.kill(pid, info.si_signo)


def exit_like(code: int) -> int:
    """The exit code, or the end by the same signal, without leaving a core of our own."""
    if code >= 0 or os.name != "posix":
        return code
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    return 128 - code
