"""Have a running Python run a script at the next safe point of its main thread.

From 3.14 on by `sys.remote_exec`, before by gdb. In the stopped process gdb calls nothing but
mmap() and Py_AddPendingCall(): neither needs the GIL, nor what malloc() locks. It reads no symbols
either, which would take most of the time that the process is stopped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from closewait_guard._files import UntrustedFileError, follow_path, refuse_writable_by_others
from closewait_guard._format import escape_line
from closewait_guard._remote.symbols import PYTHON
from closewait_guard._remote.target import Target, why_refused
from closewait_guard._remote.wire import RemoteError

__all__ = [
    "GDB",
    "REMOTE_EXEC",
    "choose_method",
    "inject_by_gdb",
    "inject_by_remote_exec",
    "only_request",
]


GDB, REMOTE_EXEC = "gdb", "remote-exec"
_MAX_SECONDS = 15.0
_PAGE = 4096
_MARK = "closewait-guard:"


def choose_method(target: Target, wanted: str) -> str:
    """The method for a process: that which is wanted, or by `auto` the one that it has.

    Raises:
        RemoteError: It cannot be used; the text says why, and what to do.
    """
    python = f"{target.name} runs Python {'.'.join(map(str, target.version))}"
    why_not = _why_not_to_start(target)
    if wanted == REMOTE_EXEC or (wanted != GDB and target.has_remote_exec and not why_not):
        if not target.has_remote_exec:
            raise RemoteError(f"{python}, and sys.remote_exec came with 3.14: use --method {GDB}")
        if target.refuses_remote_exec:
            how = target.refuses_remote_exec
            raise RemoteError(f"{target.name} was started with {how}: use --method {GDB}")
        if why_not:
            raise RemoteError(f"the interpreter of {target.name} {why_not}: use --method {GDB}")
        return REMOTE_EXEC
    if shutil.which("gdb") is None:
        raise RemoteError(f"{python}, for which gdb is needed: install it (apt-get install gdb)")
    if "mmap" not in target.addresses:
        raise RemoteError(f"the C library of {target.name} exports no mmap(), which gdb would call")
    return GDB


def _why_not_to_start(target: Target) -> str:
    """Why the interpreter of a process is not to be started by this user; empty if it may be."""
    if not target.interpreter or target.is_apart:
        return "cannot be started from here"
    if target.uid != os.geteuid():
        # That of another user may be any program, and would run as root.
        try:
            for _ in follow_path(target.interpreter, refuse_writable_by_others):
                continue
        except (UntrustedFileError, OSError) as error:
            return f"is not started as root ({error})"
    return ""


def inject_by_gdb(target: Target, script: str, token: str) -> float:
    """Have a script run, and return for how many seconds the process was stopped.

    Args:
        target: The process.
        script: Its path as the process sees it.
        token: How it begins. After a request was taken back, another user might put a file there.

    Raises:
        RemoteError: gdb has failed.
    """
    add, run = (target.addresses[name] for name in PYTHON)
    code = _code_that_runs(script, token).encode() + b"\0"
    if len(code) > _PAGE:
        raise RemoteError("the path of the folder for temporary files is too long")
    # gdb adds the zero at the end by itself.
    text = "".join(f"\\{byte:03o}" for byte in code[:-1])
    commands = [
        "set language c",
        "set confirm off",
        # A signal of the program must not end a call half way; SIGINT, which is ours, may.
        "handle all nostop noprint pass",
        "set unwindonsignal on",
        f"attach {target.pid}",
        "set $page = ((char *(*)(void *, unsigned long, int, int, int, long)) "
        f"{target.addresses['mmap']:#x})(0, {_PAGE}, 3, 0x22, -1, 0)",
        f'set {{char[{len(code)}]}} $page = "{text}"',
        f'printf "{_MARK} %d\\n", ((int (*)(void *, void *)) {add:#x})((void *) {run:#x}, $page)',
        "detach",
        "quit",
    ]
    # Without a name: whoever could write to it would have gdb do anything as this user. In memory:
    # the disk may be full, or for reading only.
    with open(os.memfd_create("commands"), "wb") as file:  # noqa: PTH123
        file.write("\n".join(commands).encode("ascii"))
        file.flush()
        output, pause = _run_gdb(target.pid, file.fileno())
    queued = output.rpartition(_MARK)[2].split()[:1]
    if _MARK not in output:
        raise RemoteError(f"gdb could not attach to {target.name}: {_refusal(output)}")
    if queued != ["0"]:
        raise RemoteError(f"{target.name} has too many calls waiting for its main thread already")
    return pause


def _code_that_runs(script: str, token: str) -> str:
    """Code that leaves no name behind, raises nothing, and uses none that a program can change."""
    inner = (
        f"with open({script!r},'rb') as f:s=f.read()\n"
        f"if s.startswith({token.encode()!r}):exec(s,{{}})"
    )
    return f"try:\n __import__('builtins').exec({inner!r},{{}})\nexcept:pass\n"


def _run_gdb(pid: int, commands: int) -> tuple[str, float]:
    """What gdb prints, and for how long it has stopped the process.

    It gets no signal of the terminal. Ended in any other way than by SIGINT, it would leave a call
    half done.
    """
    options = ("auto-solib-add off", "auto-load off", "debuginfod enabled off")
    gdb = subprocess.Popen(  # noqa: S603
        [
            shutil.which("gdb") or "gdb",
            "-batch",
            "-nx",
            *(word for option in options for word in ("-iex", f"set {option}")),
            # Where there is no file to read symbols from.
            *("-iex", f"set sysroot {os.devnull}"),
            *("-x", f"/proc/self/fd/{commands}"),
        ],
        pass_fds=(commands,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    pause = _measure_stop(pid, gdb)
    if gdb.poll() is None:
        # A thread may have been stopped with a lock that the call waits for: have it try later.
        gdb.send_signal(signal.SIGINT)
    try:
        output, _ = gdb.communicate(timeout=_MAX_SECONDS)
    except subprocess.TimeoutExpired:
        gdb.kill()
        output, _ = gdb.communicate()
    return output.decode(errors="replace"), pause


def _measure_stop(pid: int, gdb: subprocess.Popen[bytes]) -> float:
    """From the first moment to the last that the process is seen stopped, until gdb ends."""
    began = first = last = now = time.monotonic()
    is_stopped = False
    while gdb.poll() is None and now - began < _MAX_SECONDS:
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            break
        now = time.monotonic()
        if stat.rpartition(b")")[2].split()[0] in (b"t", b"T"):
            first, is_stopped = (first if is_stopped else now), True
            last = now
        elif not is_stopped:
            first = last = now
        time.sleep(0.0005)
    return last - first


@contextmanager
def only_request(target: Target) -> Iterator[None]:
    """Until the script has run: the interpreter has room for one, and another takes its place.

    Raises:
        RemoteError: Another command has one that has not run yet.
    """
    import fcntl

    # Only who may ask the process can open this file of it, and so keep others from asking.
    with Path(f"/proc/{target.pid}/environ").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RemoteError(
                f"{target.name} is being asked already, by another command: try again"
            ) from None
        yield


def inject_by_remote_exec(target: Target, script: str) -> None:
    """Have a script run, in place of one that has not run yet.

    Raises:
        RemoteError: The interpreter has refused.
    """
    # Both sides must be of one version: that of the process itself.
    code = "import sys; sys.remote_exec(int(sys.argv[1]), sys.argv[2])"
    is_own = target.uid == os.geteuid()
    try:
        done = subprocess.run(  # noqa: S603
            [target.interpreter, "-I", "-S", "-c", code, str(target.pid), script],
            # What another user's process runs by now may be something else than what was checked.
            executable=f"/proc/{target.pid}/exe" if is_own else target.interpreter,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_MAX_SECONDS,
            check=False,
            start_new_session=True,
        )
    except FileNotFoundError:
        # A process that has ended has no program any more.
        raise RemoteError(f"{target.name} has ended meanwhile") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RemoteError(f"{target.interpreter} cannot be started: {error}") from None
    if done.returncode:
        why = _refusal(done.stderr.decode(errors="replace"))
        raise RemoteError(f"sys.remote_exec has refused {target.name}: {why}")


def _refusal(output: str) -> str:
    is_forbidden = "Operation not permitted" in output
    return _reason(output).removesuffix(".") + (why_refused() if is_forbidden else "")


def _reason(output: str) -> str:
    """The last line that is not about how it goes."""
    lines = [line.strip() for line in output.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("[", "0x", "warning:"))]
    return escape_line(lines[-1]) if lines else "it gave no reason"
