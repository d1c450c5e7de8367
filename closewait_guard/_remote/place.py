"""Where the control sockets of a user lie, under which names, and how processes are asked.

One folder for each user, which no other can enter. A name has the number of the process and when it
was started, in ticks since the system was: the number alone may come to mean another process.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from closewait_guard._clock import nap, now
from closewait_guard._remote.wire import MessageSocket, RemoteError

__all__ = [
    "ask_control",
    "folder_of_this_user",
    "has_control",
    "name_of",
    "pids_named",
    "remove_stale",
]


_FOLDER = "closewait_guard"


def folder_of_this_user() -> str:
    """The folder, which is made if it is not there.

    Raises:
        RemoteError: Another user has it, or may enter it.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    # As the user that has logged in: `sudo` and daemons keep the variable.
    folder = f"{runtime}/{_FOLDER}" if _is_own(runtime) else _shared_folder(os.geteuid())
    try:
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)  # noqa: PTH102 - pathlib is slow to load
            # The program may have a mask that takes away its own rights.
            os.chmod(folder, 0o700)  # noqa: PTH101
        status = os.lstat(folder)
    except OSError as error:
        raise RemoteError(f"cannot make {folder}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise RemoteError(f"{folder} is not a folder")
    if status.st_uid != os.geteuid():
        raise RemoteError(f"{folder} belongs to user {status.st_uid}")
    if stat.S_IMODE(status.st_mode) != 0o700:
        raise RemoteError(f"{folder} has mode {stat.S_IMODE(status.st_mode):o} instead of 700")
    return folder


def _is_own(folder: str) -> bool:
    with suppress(OSError):
        return folder.startswith("/") and os.stat(folder).st_uid == os.geteuid()  # noqa: PTH116
    return False


def _shared_folder(user: int) -> str:
    return f"/tmp/{_FOLDER}-{user}"  # noqa: S108 - whose it is gets checked


def name_of(pid: int | str) -> str:
    """The name of a process's control socket.

    Raises:
        OSError: There is no such process.
    """
    stat_of, status = _text_of(f"/proc/{pid}/stat"), _text_of(f"/proc/{pid}/status")
    # Its own number, in the innermost namespace.
    own = re.search(r"^NSpid:.*\t(\d+)$", status, re.MULTILINE)
    number = own[1] if own else stat_of.partition(" ")[0]
    # The name of the program, in brackets, may hold anything.
    return f"{number}-{stat_of.rpartition(')')[2].split()[19]}"


def _paths_of(pid: int, user: int) -> Iterator[str]:
    """Where the control socket of a process may be.

    Args:
        pid: The process.
        user: Whose it is.

    Raises:
        OSError: There is no such process.
    """
    name, root = name_of(pid), _root_of(pid)
    runtimes = [f"/run/user/{user}", os.environ.get("XDG_RUNTIME_DIR", "")]
    with suppress(OSError):
        runtimes += _RUNTIME.findall(_text_of(f"/proc/{pid}/environ"))
    for runtime in dict.fromkeys(runtimes[::-1]):
        yield f"{root}{runtime}/{_FOLDER}/{name}"
    yield f"{root}{_shared_folder(user)}/{name}"


_RUNTIME = re.compile(r"(?:^|\0)XDG_RUNTIME_DIR=(/[^\0]+)")


def _root_of(pid: int) -> str:
    """What stands before the paths of a process that has other mounts, or another root."""
    with suppress(OSError):
        is_same = os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")  # noqa: PTH115
        if is_same and os.readlink(f"/proc/{pid}/root") == "/":  # noqa: PTH115
            return ""
        return f"/proc/{pid}/root"
    return ""


def remove_stale(folder: str) -> None:
    """Remove the sockets of processes that have ended without doing so."""
    with suppress(OSError):
        for name in os.listdir(folder):  # noqa: PTH208 - pathlib is slow to load
            if _NAME.fullmatch(name) and not _is_answered(folder, name):
                with suppress(OSError):
                    os.unlink(f"{folder}/{name}")  # noqa: PTH108


_NAME = re.compile(r"\d+-\d+")


def _is_answered(folder: str, name: str) -> bool:
    """Whether a process is there; in another namespace it is known only by what listens."""
    with suppress(OSError):
        if name_of(name.partition("-")[0]) == name:
            return True
    try:
        MessageSocket.to(f"{folder}/{name}", _MAX_SECONDS).close()
    except RemoteError as error:
        return not isinstance(error.__cause__, ConnectionRefusedError)
    return True


_MAX_SECONDS = 0.1


def has_control(pid: int) -> bool:
    """Whether a process has a control socket at this moment, as far as may be seen."""
    try:
        return any(os.path.exists(path) for path in _paths_of(pid, _user_of(pid)))  # noqa: PTH110
    except (OSError, RemoteError):
        return False


# A process that has just been forked begins to listen a moment later.
_SECONDS_TO_APPEAR = 0.5
_PAUSE = 0.05


def ask_control(pid: int, request: dict[str, object], timeout: float) -> dict[str, Any]:
    """What a process answers.

    Args:
        pid: The process.
        request: What is asked for.
        timeout: Seconds for the answer.

    Raises:
        RemoteError: It does not answer, or not with what was asked for.
    """
    user = _user_of(pid)
    if os.geteuid() not in (0, user):
        raise RemoteError(
            f"process {pid} belongs to user {_name_of_user(user)}: run this as that user or as root"
        )
    with _connected(pid, user) as connection:
        try:
            # What listens where the process would is not always the process.
            connection.require_peer(users={user, 0}, pid=pid)
            connection.send(request, timeout)
            answer = connection.receive(timeout)
        except RemoteError as error:
            raise RemoteError(f"process {pid}: {error}") from error
    if "error" in answer:
        raise RemoteError(f"process {pid} could not do it: {answer['error']}")
    return answer


def _connected(pid: int, user: int) -> MessageSocket:
    end = now() + _SECONDS_TO_APPEAR
    while True:
        for path in _paths_if_there(pid, user):
            with suppress(RemoteError):
                return MessageSocket.to(path, _SECONDS_TO_APPEAR)
        if now() > end:
            raise RemoteError(
                f"process {pid} has no control socket: start it by `closewait-guard run`, or "
                "call install(control=True) in it; as it is, ask it by `closewait-guard attach "
                f"{pid}`"
            )
        nap(_PAUSE)


def _paths_if_there(pid: int, user: int) -> list[str]:
    try:
        return list(_paths_of(pid, user))
    except OSError:
        raise RemoteError(f"process {pid} has ended") from None


def _user_of(pid: int) -> int:
    """Its effective user."""
    try:
        status = _text_of(f"/proc/{pid}/status")
    except OSError:
        raise RemoteError(f"no such process: {pid}") from None
    found = re.search(r"^Uid:\t\d+\t(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else os.geteuid()


def _name_of_user(user: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def pids_named(name: str) -> Iterator[int]:
    """The processes that run a program of this name: as a command, a script, a module or a title.

    `gunicorn` is `python /usr/bin/gunicorn app:app`, and its worker `gunicorn: worker [app]`.
    """
    for number in os.listdir("/proc"):  # noqa: PTH208 - pathlib is slow to load
        if not number.isdecimal() or int(number) == os.getpid():
            continue
        with suppress(OSError):
            if _is_named(_text_of(f"/proc/{number}/cmdline"), name):
                yield int(number)


def _is_named(command: str, name: str) -> bool:
    r"""Whether it is among what may name the program.

    Example:
        >>> _is_named("python\0-m\0uvicorn\0app:app", "uvicorn")
        True
        >>> _is_named("gunicorn: worker [app]", "gunicorn"), _is_named("vi\0a\0b\0x", "x")
        (True, False)
    """
    words = [word.rpartition("/")[2] for word in command.split("\0")[:3]]
    title = re.split(r"[:\s]", words[0], maxsplit=1)[0]
    return name in (title, *words)


def _text_of(path: str) -> str:
    with open(path, "rb") as file:  # noqa: PTH123 - pathlib is slow to load
        return file.read().decode(errors="replace")
