"""Start another program in this one's place, or wait for it as if it were this one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Self

from closewait_guard._preload import ChildConfig
from closewait_guard._stream import print_error

__all__ = [
    "can_stand_beside",
    "command_of",
    "exec_beside",
    "exec_program",
    "exit_like",
    "run_and_wait",
    "start_beside",
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
    start_beside(lambda: serve(program, end))
    return _exec(command, environ)


def start_beside(serve: Callable[[], None]) -> None:
    """Call a function in another process, which ends with it and is no child of the program."""
    child = os.fork()
    if not child:
        with suppress(BaseException):
            if not os.fork():
                _leave_to_program()
                serve()
        os._exit(0)
    os.waitpid(child, 0)


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
        # Of a script that is there, the interpreter may be missing.
        if isinstance(error, FileNotFoundError) and not Path(command[0]).exists():
            print_error(f"command not found: {command[0]}")
            return NOT_FOUND
        print_error(f"cannot run {command[0]}: {error.strerror}")
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
    blocked = _HANDED_ON | {signal.SIGCHLD} if _CAN_HAND_ON else frozenset[int]()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    # Where it is ignored, the end of a child is not reported.
    upon_end = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _flush()
    group = _GroupSignals() if _CAN_HAND_ON else None
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGCHLD, upon_end)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os._exit(_exec(command, environ))
    started(pid)
    if group is None:
        status = os.waitpid(pid, 0)[1]
    else:
        with group:
            status = _wait_for(pid, group)
    ended(_is_asked_to_end)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return os.waitstatus_to_exitcode(status)


def _is_asked_to_end() -> bool:
    return _CAN_HAND_ON and signal.sigtimedwait(_ENDING, 0) is not None


def _signals(*names: str) -> frozenset[int]:
    """Those of them that there are here."""
    known = signal.Signals.__members__
    return frozenset(known[name] for name in names if name in known)


_CAN_HAND_ON = hasattr(signal, "sigwaitinfo")
_ENDING = _signals("SIGTERM", "SIGINT")
_STOPPING = _signals("SIGTSTP", "SIGTTIN", "SIGTTOU")
# What the launcher causes itself: its faults, its writing, its limits.
_ITS_OWN = _signals("SIGILL", "SIGTRAP", "SIGBUS", "SIGFPE", "SIGSEGV", "SIGSYS") | _signals(
    "SIGPIPE", "SIGXFSZ", "SIGXCPU", "SIGCHLD", "SIGKILL", "SIGSTOP"
)
_HANDED_ON = frozenset(signal.valid_signals()) - _ITS_OWN if _CAN_HAND_ON else frozenset[int]()
# Where processes are sent a signal one by one.
_SECONDS_TO_REACH_ALL = 0.01
_SECONDS_TO_REMEMBER = 1.0
_MAX_SECONDS_TO_ANSWER = 1.0


def _wait_for(pid: int, group: _GroupSignals) -> int:
    """The status with which the program has ended."""
    is_asked_to_stop = False
    while True:
        info = signal.sigtimedwait(_HANDED_ON | {signal.SIGCHLD}, _SECONDS_TO_REMEMBER)
        if info is None:
            group.forget_old()
        elif info.si_signo != signal.SIGCHLD:
            is_asked_to_stop = info.si_signo in _STOPPING
            _hand_on(info, pid, group)
        else:
            changed, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if changed and not os.WIFSTOPPED(status):
                return status
            # Where only the program was stopped, only that may be continued.
            if changed and (is_asked_to_stop or os.WSTOPSIG(status) in _STOPPING):
                is_asked_to_stop = False
                _stop_by(os.WSTOPSIG(status))


def _hand_on(info: signal.struct_siginfo, pid: int, group: _GroupSignals) -> None:
    """Send the program the signal, unless it has got that as a member of the process group."""
    sleep(_SECONDS_TO_REACH_ALL)
    was_to_group = group.have_received(info.si_signo)
    if was_to_group is None:
        # What the kernel sends comes from the terminal, to the group.
        was_to_group = info.si_code > 0
    if was_to_group:
        # `timeout` sends it to this process, and again to the group.
        again = signal.sigtimedwait({info.si_signo}, 0)
        if again is None or again.si_pid == info.si_pid:
            return
    # To the kernel, too, a stop takes back that a process is to continue, and the reverse. What
    # the group has received is not known then.
    if signal.sigpending() & _takes_back(info.si_signo):
        return
    # It may run as another user by now.
    with suppress(OSError):
        os.kill(pid, info.si_signo)


def _takes_back(number: int) -> frozenset[int]:
    if number == signal.SIGCONT:
        return _STOPPING
    return frozenset({signal.SIGCONT}) if number in _STOPPING else frozenset()


def _stop_by(number: int) -> None:
    """Stop as the program has, for the shell to see; unless that continues already."""
    if signal.SIGCONT in signal.sigpending():
        return
    # One that has come to this process, too, is the same one as long as it is blocked.
    signal.raise_signal(number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)


class _GroupSignals:
    """Knows which signals were sent to the whole process group.

    Nothing says so of a signal itself. Another process of the group receives them, and is asked.
    It has a name of its own: a signal to all processes of the launcher's name is not for the group.
    """

    def __init__(self) -> None:
        self._pid = 0
        launcher = os.getpid()
        self._line, theirs = socket.socketpair()
        self._line.settimeout(_MAX_SECONDS_TO_ANSWER)
        with theirs, suppress(OSError):
            self._pid = os.fork()
            if not self._pid:
                _receive_forever(theirs, launcher)

    def have_received(self, number: int) -> bool | None:
        """Whether they have since the last call for this signal; None if that is not known."""
        try:
            if number == signal.SIGCONT:
                # It may have been stopped, and this process been continued alone. Before it is
                # asked: one that is pending still would take in the next that the group receives.
                os.kill(self._pid, number)
            self._line.send(bytes([number]))
            answer = self._line.recv(1)
        except OSError:
            answer = b""
        if not answer:
            self._line.close()
            return None
        return bool(answer[0])

    def forget_old(self) -> None:
        """Forget what was received before the last call, and not by the launcher."""
        with suppress(OSError):
            self._line.send(bytes([_FORGET]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._line.close()
        if self._pid:
            # It may have been stopped.
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


# No signal has this number.
_FORGET = 0


def _receive_forever(line: socket.socket, launcher: int) -> None:
    """In the other process: it ends with the launcher."""
    with suppress(BaseException):
        _rename("group-signals")
        for path in list(Path("/proc/self/fd").iterdir()):
            if int(path.name) != line.fileno():
                with suppress(OSError):
                    os.close(int(path.name))
        old, new = set[int](), set[int]()
        while asked := line.recv(1):
            while (info := signal.sigtimedwait(_HANDED_ON, 0)) is not None:
                if info.si_pid != launcher:
                    new.add(info.si_signo)
            if asked[0] == _FORGET:
                old, new = new, set()
            else:
                line.send(bytes([asked[0] in old | new]))
                old.discard(asked[0])
                new.discard(asked[0])
    os._exit(0)


def _rename(name: str) -> None:
    """Give this process another name and command, as others see them."""
    Path("/proc/self/comm").write_text(name)
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    with open("/proc/self/mem", "r+b", buffering=0) as memory:  # noqa: PTH123
        memory.seek(start)
        memory.write(name.encode()[: end - start].ljust(end - start, b"\0"))


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
