"""Whose code opened a socket: the installed packages, with their versions, and the program's own.

Nothing is imported for it. What pip has written beside an installed package is read, for each file
once; `importlib.metadata` would take longer to load than that takes.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import NamedTuple

from closewait_guard._interruptions import refusals
from closewait_guard.model import Frame, FrameKind, SocketRecord

__all__ = [
    "Packages",
    "packages_of",
]


# They open sockets for other libraries, or only call what they are given: whose code it is, the
# calls before and after theirs say.
_FOR_OTHERS = frozenset(
    {
        *("aiohappyeyeballs", "anyio", "eventlet", "gevent", "httpcore", "httpcore2", "trio"),
        *("_pytest", "asgiref", "click", "pluggy", "typer", "xdist"),
        *("backoff", "decorator", "retrying", "stamina", "tenacity", "wrapt"),
        *("ddtrace", "elasticapm", "newrelic", "opentelemetry", "sentry_sdk"),
    }
)
# In folders of these names each package is a part of the program by itself.
_FOLDERS_OF_PARTS = frozenset(
    {"addons", "apps", "components", "extensions", "integrations", "modules", "plugins"}
)
_INSTALLED = re.compile(r"(.*/(?:site|dist)-packages)/(.+)")
_NAME_AND_VERSION = re.compile(rb"^(Name|Version):\s*(\S+)", re.MULTILINE)
_METADATA_HEAD = 4096


class Packages(NamedTuple):
    """Whose code opened a socket. A name with its version, where that is known.

    Attributes:
        package: What opened it: a library, else the program's own package.
        via: The outermost library that the program called for it, if that is another.
        caller: The program's own package, whose line it is.
    """

    package: str = ""
    via: str = ""
    caller: str = ""


def packages_of(record: SocketRecord) -> Packages:
    """The package whose code opened a socket, and those that called it."""
    stack = record.blamed.stack
    own = next((place for place, frame in enumerate(stack) if frame.kind is FrameKind.USER), None)
    inner = stack if own is None else stack[:own]
    caller = "" if own is None else _part_of_program(stack[own])
    libraries = _libraries_of([each.filename for each in inner if each.kind is FrameKind.LIBRARY])
    if not libraries:
        return Packages(caller, "", caller)
    package, *others = libraries
    # Without a line of the program, further out there is what has started it.
    via = (others[-1] if caller else others[0]) if others else ""
    return Packages(package, via, caller)


def _libraries_of(filenames: list[str]) -> list[str]:
    """The libraries, each once, the innermost first."""
    found = [each for each in map(_distribution_of, filenames) if each is not None]
    telling = [each for each in found if each.module not in _FOR_OTHERS] or found
    return list(dict.fromkeys(each.label for each in telling))


def _part_of_program(frame: Frame) -> str:
    """Its package, to two levels; one more in a folder of parts."""
    folder, _, name = _normal(frame.filename).rpartition("/")
    stem = name.partition(".")[0]
    names = frame.module.split(".")
    if name.startswith("<"):
        return ""
    if stem == "__main__":
        names = [folder.rpartition("/")[2]]
    elif stem == names[-1]:
        names = names[:-1] or names
    elif stem != "__init__":
        # A program, or imported by its path under a name that was made up.
        names = [stem]
    return ".".join(names[: 3 if names[1:2] and names[1] in _FOLDERS_OF_PARTS else 2])


# Installed distributions.


class _Installed(NamedTuple):
    """What a file belongs to: the top level of its modules, and the name and version to show."""

    module: str
    label: str


def _distribution_of(filename: str) -> _Installed | None:
    match = _INSTALLED.fullmatch(_normal(filename))
    if match is None:
        return None
    folder, path = match.groups()
    module = path.partition("/")[0].partition(".")[0]
    try:
        return _Installed(module, _look_up(folder, path, module))
    except Exception as error:
        # There may be no descriptor left: then it is asked again of the next socket.
        refusals.note(error)
        return _Installed(module, module)


@lru_cache(4096)
def _look_up(folder: str, path: str, module: str) -> str:
    """The name and version of the distribution that a file was installed with."""
    wanted = _plain(module).strip("_")

    def likeness(entry: str) -> tuple[bool, bool]:
        name = _plain(entry.partition("-")[0])
        return name != wanted, wanted not in name

    for entry in sorted(_entries(folder), key=likeness):
        if _has_installed(f"{folder}/{entry}", path, module, is_named=not likeness(entry)[0]):
            return _name_and_version(f"{folder}/{entry}") or module
    return module


@lru_cache(64)
def _entries(folder: str) -> tuple[str, ...]:
    """What installers have written in a folder: a folder for each distribution."""
    names = os.listdir(folder)  # noqa: PTH208 - pathlib is slow to load
    return tuple(name for name in names if name.endswith((".dist-info", ".egg-info")))


def _has_installed(entry: str, path: str, module: str, *, is_named: bool) -> bool:
    """Whether a distribution has installed a file, as far as its installer says."""
    if (files := _read(f"{entry}/RECORD")) is not None:
        return f"\n{path},".encode() in b"\n" + files
    if (modules := _read(f"{entry}/top_level.txt")) is not None:
        return module.encode() in modules.split()
    return is_named


def _name_and_version(entry: str) -> str:
    for name in ("METADATA", "PKG-INFO"):
        if (head := _read(f"{entry}/{name}", _METADATA_HEAD)) is not None:
            # The description of a package may look like another field.
            found = dict(reversed(_NAME_AND_VERSION.findall(head)))
            parts = (found.get(b"Name", b""), found.get(b"Version", b""))
            return b" ".join(filter(None, parts)).decode(errors="replace")
    return ""


def _read(path: str, size: int = -1) -> bytes | None:
    """The content, or the first bytes of it; None where there is no such file."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib is slow to load
            return file.read(size)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _normal(filename: str) -> str:
    return filename.replace("\\", "/")
