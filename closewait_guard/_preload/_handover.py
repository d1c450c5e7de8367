"""What the launcher hands over to the program's processes, in their environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

from closewait_guard._preload._line import Channel

__all__ = ["Handover"]

# With an underscore before it: the settings refuse names that they do not know.
_VARIABLE = "_CLOSEWAIT_GUARD_RUN"
_MAIN = "_CLOSEWAIT_GUARD_MAIN"
_FOLDER = str(Path(__file__).parent)


class Handover(NamedTuple):
    """What settings have no name for.

    Attributes:
        reporters: Who is told at every interval, by name.
        channel: How to tell the launcher how a process ends; None if it does not wait for that.
    """

    reporters: tuple[str, ...]
    channel: Channel | None = None

    def environment(
        self, settings: Mapping[str, str], environ: Mapping[str, str]
    ) -> dict[str, str]:
        """The environment in which a program and its Python children are guarded."""
        paths = [_FOLDER]
        # An empty path would stand for the directory that the program is started in.
        paths += [path for path in (environ.get("PYTHONPATH"),) if path]
        return {
            **environ,
            **settings,
            "PYTHONPATH": os.pathsep.join(paths),
            _VARIABLE: json.dumps(self),
        }

    @classmethod
    def taken(cls, environ: Mapping[str, str]) -> Self:
        """What the launcher has handed over."""
        reporters, channel = json.loads(environ[_VARIABLE])
        return cls(tuple(reporters), None if channel is None else Channel.of(*channel))

    @staticmethod
    def marked_main(environ: dict[str, str], pid: int) -> dict[str, str]:
        """The environment of the process that is the program, not a child of it."""
        return environ | {_MAIN: str(pid)}

    @staticmethod
    def is_main(environ: Mapping[str, str], pid: int) -> bool:
        """Whether this process is the program itself, not a child of it."""
        return environ.get(_MAIN) == str(pid)
