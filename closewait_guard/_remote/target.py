"""What kind of process one is to attach to, found out before anything in it is touched.

Each obstacle is one sentence with what to do about it. Linux only.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from closewait_guard._processes import how_to_be_permitted, user
from closewait_guard._remote.symbols import PYTHON, find_symbols
from closewait_guard._remote.wire import RemoteError

__all__ = [
    "NotPythonError",
    "Target",
    "describe_wait",
    "inspect_target",
    "may_leak",
    "why_refused",
]


# What the guard runs on; and where `sys.remote_exec` came.
_OLDEST, _WITH_REMOTE_EXEC = (3, 11), (3, 14)
_FREE_THREADED = re.compile(r"python3\.\d+t\b")


class NotPythonError(RemoteError):
    """It is another program."""


class Target(NamedTuple):
    """A running CPython that may be attached to.

    Attributes:
        pid: Its process.
        uid: The user that it runs as, effectively.
        program: What to call it in a message.
        version: Such as (3, 13).
        addresses: Where functions are in its memory.
        interpreter: The file that it runs, if that is one that can be started as Python.
        refuses_remote_exec: How it was told to refuse `sys.remote_exec`; empty if it was not.
        is_helper: multiprocessing has started it to start other processes, or to count what these
            share: it waits, and has no sockets of the program.
        is_apart: Its root directory is another than ours, as in a container.
    """

    pid: int
    uid: int
    program: str
    version: tuple[int, int]
    addresses: Mapping[str, int]
    interpreter: str
    refuses_remote_exec: str
    is_helper: bool
    is_apart: bool

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return f"process {self.pid} ({self.program})"

    @property
    def has_remote_exec(self) -> bool:
        """Whether its Python has `sys.remote_exec`."""
        return self.version >= _WITH_REMOTE_EXEC


def inspect_target(pid: int) -> Target:
    """The process of a number.

    Raises:
        RemoteError: It cannot be attached to; the text says why, and what to do.
    """
    if sys.platform != "linux":
        raise RemoteError("attach needs Linux; elsewhere use closewait-guard run")
    if pid == os.getpid():
        raise RemoteError(f"process {pid} is this command itself")
    try:
        status = _status_of(pid)
        uid, program = int(status["Uid"].split()[1]), status["Name"]
        named = f"process {pid} ({program})"
        _require_running(pid, named, status)
        _require_permission(pid, named, uid)
        return _identify(pid, named, uid)
    except (FileNotFoundError, ProcessLookupError):
        raise RemoteError(f"no such process: {pid}") from None


def _status_of(pid: int | str) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        lines = (line.partition(":") for line in file)
        return {name: value.strip() for name, _, value in lines}


def _require_running(pid: int, named: str, status: Mapping[str, str]) -> None:
    if (process := int(status["Tgid"])) != pid:
        raise RemoteError(f"{pid} is a thread: attach to its process, {process}")
    if status["State"].startswith(("Z", "X")):
        raise RemoteError(f"{named} has ended")
    if tracer := int(status["TracerPid"]):
        raise RemoteError(f"{named} is traced by process {tracer} (gdb, strace): end that")
    if status["State"].startswith("T"):
        raise RemoteError(f"{named} is stopped, and runs nothing: kill -CONT {pid}")


def _require_permission(pid: int, named: str, uid: int) -> None:
    """Ask the kernel: the same rights as for a debugger open the memory of a process."""
    try:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))
    except PermissionError:
        raise RemoteError(f"not permitted to attach to {named}: {_right_lacking(uid)}") from None


def _right_lacking(uid: int) -> str:
    own, scope = os.geteuid(), _ptrace_scope()
    if scope == "3":
        return "kernel.yama.ptrace_scope is 3, which forbids it until the machine starts again"
    if own not in (0, uid):
        return f"it is of user {user(uid)}; {how_to_be_permitted()}"
    if own and scope in ("1", "2"):
        cure = "run as root" + (", or set it to 0 with sysctl" if scope == "1" else "")
        return f"kernel.yama.ptrace_scope is {scope}; {cure}"
    return how_to_be_permitted("run as root: it has more rights than this user") + _limit_of_root()


def _limit_of_root() -> str:
    """What no right changes in a user namespace."""
    with suppress(OSError), open("/proc/self/uid_map", encoding="ascii") as file:  # noqa: PTH123
        if not os.geteuid() and file.read().split() != ["0", "0", "4294967295"]:
            return "; in a rootless container it reaches no process outside: run it on the host"
    return ""


def why_refused() -> str:
    """What may refuse a debugger that has the right; empty if nothing is known to."""
    with suppress(OSError):
        if _status_of("self").get("Seccomp") == "2":
            return (
                "; a seccomp filter is in force here, which may forbid it (docker run "
                "--security-opt seccomp=unconfined; Kubernetes: seccompProfile, type: Unconfined)"
            )
    return ""


def _ptrace_scope() -> str:
    with suppress(OSError), open("/proc/sys/kernel/yama/ptrace_scope", encoding="ascii") as file:  # noqa: PTH123
        return file.read().strip()
    return ""


def _identify(pid: int, named: str, uid: int) -> Target:
    found = find_symbols(pid)
    if not all(name in found.addresses for name in PYTHON):
        if found.unread:
            raise RemoteError(f"{named}: {found.unread} cannot be read; {how_to_be_permitted()}")
        raise NotPythonError(f"{named} is not Python: it exports no {PYTHON[0]}()")
    if not found.version:
        raise RemoteError(f"{named} runs a Python older than 3.11, which is the oldest supported")
    arguments = _words_of(pid, "cmdline")
    version = found.version >> 24, found.version >> 16 & 0xFF
    interpreter = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")  # noqa: PTH115
    if _FREE_THREADED.search(interpreter):
        raise RemoteError(f"{named} runs a Python without the GIL, which is not supported")
    return Target(
        pid=pid,
        uid=uid,
        program=named.partition("(")[2][:-1],
        version=version,
        addresses=found.addresses,
        interpreter=interpreter if "python" in interpreter.rpartition("/")[2] else "",
        refuses_remote_exec=_refusal_of_remote_exec(arguments, _words_of(pid, "environ")),
        is_helper=_is_helper(pid, arguments),
        is_apart=_root(pid) != _root("self"),
    )


def may_leak(pid: int) -> bool:
    """Whether a process runs Python, under any name, and is not known to have no leaks of its own.

    This command has none, which may be below what it asks, nor has a helper of multiprocessing.
    """
    if pid == os.getpid():
        return False
    with suppress(OSError):
        arguments = _words_of(pid, "cmdline")
        if _is_helper(pid, arguments):
            return False
        program = os.readlink(f"/proc/{pid}/exe").rpartition("/")[2]  # noqa: PTH115
        return program.startswith("python") or PYTHON[0] in find_symbols(pid).addresses
    return False


def _is_helper(pid: int, arguments: Sequence[bytes]) -> bool:
    # That of multiprocessing, or the one that joblib has in its place.
    if _names(b"resource_tracker import main", arguments):
        return True
    server = b"multiprocessing.forkserver import main"
    if not _names(server, arguments):
        return False
    # What it has forked has the same arguments.
    return not _names(server, _words_of(int(_status_of(pid)["PPid"]), "cmdline"))


def _names(code: bytes, arguments: Sequence[bytes]) -> bool:
    return any(code in each for each in arguments)


def _root(pid: int | str) -> tuple[str, int, int]:
    """What identifies the files that a process sees."""
    status = os.stat(f"/proc/{pid}/root/")  # noqa: PTH116
    return os.readlink(f"/proc/{pid}/ns/mnt"), status.st_dev, status.st_ino  # noqa: PTH115


def _words_of(pid: int, name: str) -> list[bytes]:
    with open(f"/proc/{pid}/{name}", "rb") as file:  # noqa: PTH123
        return file.read().split(b"\0")


def _refusal_of_remote_exec(arguments: Sequence[bytes], variables: Sequence[bytes]) -> str:
    if any(re.match(rb"PYTHON_DISABLE_REMOTE_DEBUG=.", each) for each in variables):
        return "PYTHON_DISABLE_REMOTE_DEBUG"
    if b"disable-remote-debug" in b" ".join(arguments).replace(b"_", b"-"):
        return "-X disable-remote-debug"
    return ""


def describe_wait(pid: int) -> str:
    """What the main thread of a process does that keeps it from running Python code.

    Raises:
        OSError: It has ended.
    """
    with open(f"/proc/{pid}/syscall", encoding="ascii") as file:  # noqa: PTH123
        words = file.read().split()
    if words[0] == "running":
        return "it runs code of an extension"
    if (number := int(words[0])) < 0:
        return "it is stopped by the kernel"
    name, has_fd = _CALLS.get(os.uname().machine, {}).get(number, (f"system call {number}", False))
    where = f"it waits in {name}"
    return f"{where}, descriptor {int(words[1], 16)}" if has_fd else where


# Those that a main thread waits in, and whether the first argument is a descriptor.
_NAMES = {
    "accept()": (True, 43, 202),
    "accept4()": (True, 288, 242),
    "clock_nanosleep()": (False, 230, 115),
    "connect()": (True, 42, 203),
    "epoll_wait()": (True, 232, None),
    "epoll_pwait()": (True, 281, 22),
    "flock()": (True, 73, 32),
    "futex(), for a lock": (False, 202, 98),
    "poll()": (False, 7, None),
    "ppoll()": (False, 271, 73),
    "pselect6()": (False, 270, 72),
    "read()": (True, 0, 63),
    "recvfrom()": (True, 45, 207),
    "recvmsg()": (True, 47, 212),
    "rt_sigtimedwait()": (False, 128, 137),
    "select()": (False, 23, None),
    "sendto()": (True, 44, 206),
    "wait4(), for a child": (False, 61, 260),
    "waitid(), for a child": (False, 247, 95),
    "write()": (True, 1, 64),
}
_CALLS = {
    machine: {numbers[place]: (name, has_fd) for name, (has_fd, *numbers) in _NAMES.items()}
    for place, machine in enumerate(("x86_64", "aarch64"))
}
