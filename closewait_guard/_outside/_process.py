"""One process as it is seen from outside, on whatever platform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

__all__ = ["Process", "program_of"]


class Process(NamedTuple):
    """Who it is, and what it has open.

    Attributes:
        program: Its name, and a Python program's script or module; no arguments.
        python: The version of its interpreter as far as it shows; empty for other programs.
        sockets: Inode by descriptor; 0 where the platform has none.
        started: Tells it from the next process that gets its number; 0 where that is known
            otherwise.
    """

    pid: int
    program: str
    python: str
    parent: int
    fd_used: int | None
    fd_limit: int | None
    sockets: Mapping[int, int]
    started: int = 0


_MOST = 60


def program_of(command: Sequence[str]) -> str:
    """The program in a command line, without arguments, which may hold secrets.

    Example:
        >>> program_of(["/usr/bin/python3", "-u", "app.py", "--password=x"])
        'python3 app.py'
        >>> program_of(["/usr/bin/python3", "-m", "gunicorn", "app:app"])
        'python3 -m gunicorn'
        >>> program_of(["nginx: worker process"]), program_of(["/usr/sbin/nginx", "-g", "x"])
        ('nginx: worker process', 'nginx')
    """
    if not command or not command[0]:
        return ""
    if len(command) == 1 and " " in command[0]:
        # The program has renamed itself.
        return command[0].strip()[:_MOST]
    name = PurePath(command[0]).name
    if not name.startswith("python"):
        return name[:_MOST]
    return " ".join([name, *_script(command[1:])])[:_MOST]


def _script(arguments: Sequence[str]) -> list[str]:
    """A Python program's own name: the module, or the script's file."""
    takes_value = False
    for place, argument in enumerate(arguments):
        if argument == "-m":
            return [argument, *arguments[place + 1 : place + 2]]
        if argument == "-c":
            return [argument]
        if not argument.startswith("-") and not takes_value:
            return [PurePath(argument).name]
        takes_value = argument in ("-W", "-X")
    return []
