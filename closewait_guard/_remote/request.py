"""The request to a running process: a folder that both see, with its script and its socket."""

from __future__ import annotations

import os
import secrets
import select
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any, Self

from closewait_guard._remote import injected
from closewait_guard._remote.injection import (
    GDB,
    REMOTE_EXEC,
    inject_by_gdb,
    inject_by_remote_exec,
)
from closewait_guard._remote.target import Target
from closewait_guard._remote.wire import Listener, RemoteError

__all__ = [
    "NotYetError",
    "Request",
    "room_for_descriptors",
]


_PACKAGE = Path(__file__).parents[1]
# What a scan needs, and some that other threads may take meanwhile.
_DESCRIPTORS = 32
_FOLDERS = ("tmp", "var/tmp", "dev/shm")
_SCRIPT = "script.py"
# Of the package; what is compiled fits the original's times only.
_NOT_NEEDED = ("pytest_plugin", "commands", "_preload", "__pycache__")
# What a copy of the rest takes.
_ROOM, _MAX_FILES = 4 << 20, 400


class NotYetError(RemoteError):
    """Nothing has come in time."""


class Request:
    """The folder of a request, with its script and its socket; gone in the end.

    Its owner is the user of the process, and no one else may enter it.
    """

    def __init__(self, target: Target, order: Mapping[str, object], is_cancelled: Event) -> None:
        self._target, self._order, self._is_cancelled = target, dict(order), is_cancelled
        self._token = f"#{secrets.token_hex(16)}"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._process = stack.enter_context(_process_end(self._target.pid))
            self._folder, self._inside = stack.enter_context(_shared_folder(self._target))
            self._listener = stack.enter_context(Listener(str(self._folder / "socket")))
            self._write_script()
            self._give_away()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def _write_script(self) -> None:
        package = str(_PACKAGE)
        if self._target.is_apart or self._target.uid != os.geteuid():
            # The process may not see it, or not be allowed to.
            ignore = shutil.ignore_patterns(*_NOT_NEEDED)
            place = self._folder / _PACKAGE.name
            shutil.copytree(_PACKAGE, place, ignore=ignore, copy_function=_copy_new)
            package = f"{self._inside}/{_PACKAGE.name}"
        source = Path(injected.__file__).read_text(encoding="utf-8")
        order = self._order | {"while": f"{self._inside}/{_SCRIPT}"}
        call = f"begin({package!r}, {self._inside + '/socket'!r}, {order!r})"
        script = f"{self._token}\n{source}\n{call}\n"
        # New: not what a link leads to that root of a container has put there.
        with (self._folder / _SCRIPT).open("x", encoding="utf-8") as file:
            file.write(script)

    def _give_away(self) -> None:
        if self._target.uid != os.geteuid():
            # The folder last: from then on its owner may put a link in the place of a file.
            for path in (*self._folder.rglob("*"), self._folder):
                os.chown(path, self._target.uid, -1)

    def make(self, method: str) -> float:
        """Have the process run the script soon; return for how long it was stopped."""
        script = f"{self._inside}/{_SCRIPT}"
        try:
            if method == GDB:
                return inject_by_gdb(self._target, script, self._token)
            inject_by_remote_exec(self._target, script)
        except RemoteError:
            self._require_running()
            raise
        return 0.0

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended, as far as that can be seen."""
        return self._process is None or not select.select([self._process], [], [], 0)[0]

    def _require_running(self) -> None:
        if not self.is_running:
            raise RemoteError(f"{self._target.name} has ended meanwhile")

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next message of the process.

        Raises:
            RemoteError: It has ended, sends something else, or nothing in that time.
        """
        end = time.monotonic() + timeout
        while not self._listener.wait(min(0.05, max(0.0, end - time.monotonic()))):
            self._require_running()
            if time.monotonic() >= end or self._is_cancelled.is_set():
                raise NotYetError(f"{self._target.name} did not answer within {timeout:g} s")
        with self._listener.accept(1) as connection:
            connection.require_peer(users={self._target.uid}, pid=self._target.pid)
            return connection.receive(max(1.0, end - time.monotonic()))

    def end_watch(self) -> None:
        """Let what runs in the process know that the time is over."""
        (self._folder / _SCRIPT).unlink(missing_ok=True)

    def take_back(self, method: str) -> None:
        """What runs late must find nothing to do: no file, or one that is empty."""
        if method == REMOTE_EXEC:
            # The interpreter would complain of a missing file.
            with suppress(RemoteError):
                inject_by_remote_exec(self._target, os.devnull)


@contextmanager
def room_for_descriptors(pid: int) -> Iterator[int | None]:
    """Let a process that has reached its limit of descriptors open a few more for this long.

    Yields what the limit is otherwise, where it was raised.

    Raises:
        RemoteError: It may not have even one more, without which it cannot answer.
    """
    # Not everywhere, where a sentence is to say so.
    import resource

    kind = resource.RLIMIT_NOFILE
    soft = hard = resource.RLIM_INFINITY
    with suppress(PermissionError):
        soft, hard = resource.prlimit(pid, kind)
    used = {int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir()}
    if soft == resource.RLIM_INFINITY or len(used) + _DESCRIPTORS < soft:
        yield None
        return
    limit, raised = soft, soft + _DESCRIPTORS
    # Beyond the hard limit only who has CAP_SYS_RESOURCE may let it.
    for wanted in (raised, max(raised, hard)), (hard, hard):
        with suppress(OSError, ValueError):
            resource.prlimit(pid, kind, wanted)
            limit = wanted[0]
            break
    try:
        if used.issuperset(range(limit)):
            raise RemoteError(
                f"process {pid} has reached its limit of {limit:,} descriptors, and needs one more "
                f"to answer: raise it by `prlimit --pid {pid} --nofile={raised}` as root, outside "
                "of the container if it is in one"
            )
        yield soft if limit > soft else None
    finally:
        with suppress(OSError, ValueError):
            resource.prlimit(pid, kind, (soft, hard))


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


def _copy_new(source: str, target: str) -> None:
    """Copy a file to where none may be, nor a link."""
    with open(source, "rb") as file, open(target, "xb") as copy:  # noqa: PTH123
        shutil.copyfileobj(file, copy)


@contextmanager
def _shared_folder(target: Target) -> Iterator[tuple[Path, str]]:
    """A folder of its own below the root directory of a process: for us, and as it sees it."""
    parent, seen = _open_parent(target)
    name = f"closewait-guard-{target.pid}-{secrets.token_hex(8)}"
    # By the descriptor it is found after the process has ended, too; by gdb as well.
    folder = Path(f"/proc/{os.getpid()}/fd/{parent}", name)
    try:
        folder.mkdir(mode=0o700)
        made = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # Whoever owns the parent may have put another in its place.
            held, status = Path(f"/proc/{os.getpid()}/fd/{made}"), os.fstat(made)
            is_ours = (status.st_uid, status.st_mode & 0o777) == (os.geteuid(), 0o700)
            if not is_ours or any(held.iterdir()):
                raise RemoteError(f"another process has replaced {seen}/{name}")
            yield held, f"{seen}/{name}"
        finally:
            os.close(made)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(parent)


def _open_parent(target: Target) -> tuple[int, str]:
    for name in _FOLDERS:
        path = f"/proc/{target.pid}/root/{name}"
        if os.access(path, os.W_OK | os.X_OK) and _has_room(path):
            return os.open(path, os.O_PATH | os.O_DIRECTORY), f"/{name}"
    raise RemoteError(
        f"none of /tmp, /var/tmp and /dev/shm of {target.name} can be written to and has "
        f"{_ROOM >> 20} MB left"
    )


def _has_room(path: str) -> bool:
    room = os.statvfs(path)
    # Some file systems do not count files.
    has_files = room.f_favail > _MAX_FILES or not room.f_files
    return has_files and room.f_bavail * room.f_frsize >= _ROOM
