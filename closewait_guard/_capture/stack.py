"""Capture a stack cheaply; share what is equal among the sockets that live on."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from operator import is_
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from closewait_guard._enums import FrameKind

if TYPE_CHECKING:
    from closewait_guard.model import Frame

__all__ = [
    "NO_STACK",
    "PROGRAM",
    "Capture",
    "CapturedStack",
    "SharedStack",
    "capture",
    "capture_up_to",
    "intern",
    "is_called_by",
    "kind_of_file",
    "normal_path",
    "owner_of",
    "uncaptured",
]


# Bounds what the table of shared stacks can hold; a program with more begins with an empty one.
_MAX_STACKS = 10_000
# Bound what a search of the calls around a call can take, and what it remembers of their files.
_MAX_CALLS, _MAX_FILES = 20, 4096


class SharedStack:
    """A stack that several creations share: code objects and offsets, innermost first."""

    __slots__ = ("codes", "frames", "offsets")

    def __init__(self, codes: list[CodeType], offsets: tuple[int, ...]) -> None:
        self.codes = codes
        self.offsets = offsets
        self.frames: tuple[Frame, ...] | None = None


# As captured: code, offset, code, offset, ... outwards. Once interned: one SharedStack.
CapturedStack = list[Any]

NO_STACK: CapturedStack = []

Capture = Callable[[FrameType, int], CapturedStack]

_shared: dict[tuple[int, ...], SharedStack] = {}


def capture(frame: FrameType, depth: int) -> CapturedStack:
    """Remember at most `depth` calls, from `frame` outwards: code and offset, never the frame."""
    stack: CapturedStack = []
    for _ in range(depth):
        stack.append(frame.f_code)
        stack.append(frame.f_lasti)
        frame = frame.f_back  # type: ignore[assignment]
        if frame is None:
            break
    return stack


def capture_up_to(ends: Iterable[CodeType]) -> Capture:
    """Like `capture`, but of the calls further out none from the first of any of `ends` on."""
    # By the identity of the code, because a code object hashes its constants.
    known = {id(code): code for code in ends}

    def capture(innermost: FrameType, depth: int) -> CapturedStack:
        stack: CapturedStack = [innermost.f_code, innermost.f_lasti]
        frame = innermost.f_back
        # Not a range: most stacks of a test end after a call or two.
        while depth > 1 and frame is not None:
            code = frame.f_code
            if id(code) in known:
                break
            stack.append(code)
            stack.append(frame.f_lasti)
            frame = frame.f_back
            depth -= 1
        return stack

    return capture


def intern(stack: CapturedStack) -> None:
    """Make a stack small, in place, by sharing what is equal.

    Equals are found by their offsets, and then compared: hashing a code object would hash all of
    its constants. Still too expensive for every creation: it is done for sockets that stay open.
    """
    # Of a copy: another thread may make the stack small between two looks at it.
    captured = stack.copy()
    if len(captured) <= 1:
        return
    codes, offsets = captured[::2], tuple(captured[1::2])
    known = _shared.get(offsets)
    # By identity: code objects of two files are equal where the files read alike.
    if known is None or not all(map(is_, known.codes, codes)):
        if len(_shared) >= _MAX_STACKS:
            _shared.clear()
        known = _shared[offsets] = SharedStack(codes, offsets)
    stack[:] = [known]


def is_called_by(frame: FrameType | None, packages: tuple[str, ...]) -> bool:
    """Whether a call or one around it is of some packages or modules, not the program's own."""
    is_of_packages, calls = _files_of(packages), 0
    while frame is not None and calls < _MAX_CALLS:
        if is_of_packages[frame.f_code.co_filename]:
            return True
        frame = frame.f_back
        calls += 1
    return False


@cache
def _files_of(packages: tuple[str, ...]) -> _Files:
    return _Files(packages)


class _Files(dict[str, bool]):
    """By name, whether a file is of some packages or modules, not the program's own.

    A cached function takes three times as long for each call.
    """

    def __init__(self, packages: tuple[str, ...]) -> None:
        super().__init__()
        paths = [f"/{name.replace('.', '/')}" for name in packages]
        self._ends = [path + end for path in paths for end in ("/", ".py")]

    def __missing__(self, filename: str) -> bool:
        if len(self) >= _MAX_FILES:
            self.clear()
        path = normal_path(filename)
        is_of_packages = any(end in path for end in self._ends)
        found = self[filename] = is_of_packages and kind_of_file(path) is not FrameKind.USER
        return found


def uncaptured(_: FrameType, __: int) -> CapturedStack:
    """In place of `capture` where no calls are wanted."""
    return NO_STACK


# The owner of the program's own files.
PROGRAM = frozenset({"the program"})


@lru_cache(4096)
def owner_of(filename: str) -> frozenset[str] | None:
    """`PROGRAM`; for what runs tasks, the names of the functions that do; None for other files.

    Code that was made at runtime, or is given with `-c`, may be of anything.
    """
    path = normal_path(filename)
    if kind_of_file(path) is FrameKind.USER:
        return None if path.startswith(_GUARD) or path == "<string>" else PROGRAM
    return next((names for end, names in _RUNNERS.items() if path.endswith(end)), None)


def kind_of_file(filename: str) -> FrameKind:
    """Whose code a file is, by where it lies."""
    path = normal_path(filename)
    if "/site-packages/" in path or "/dist-packages/" in path or path.startswith(_GENERATED):
        return FrameKind.LIBRARY
    if path.startswith(_STDLIB):
        return FrameKind.STDLIB
    # Code that a library makes for its decorators and classes, as SQLAlchemy and attrs call it.
    if path.startswith("<") and " generated " in path:
        return FrameKind.LIBRARY
    return FrameKind.USER


def normal_path(filename: str) -> str:
    """With slashes between folders, on each platform."""
    return filename.replace("\\", "/")


# Not from sysconfig, which reads how Python was built, and takes longer than all the rest.
_STDLIB = ("<frozen ", normal_path(socket.__file__).rpartition("/")[0] + "/")
# Code that libraries make at runtime, for the functions that they decorate.
_GENERATED = ("<sqlalchemy generated ", "<attrs generated ")
_RUNNERS = {
    "/asyncio/events.py": frozenset({"_run"}),
    "/asyncio/runners.py": frozenset({"run"}),
    "/trio/_core/_run.py": frozenset({"unrolled_run"}),
}
_GUARD = normal_path(__file__).rpartition("/_capture/")[0] + "/"
