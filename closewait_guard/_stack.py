"""Capture a stack cheaply, resolve it late, tell user frames from library frames."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from operator import is_
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

from closewait_guard._socket_values import Frame
from closewait_guard._vocabulary import FrameKind

__all__ = [
    "NO_STACK",
    "Capture",
    "Stack",
    "capture",
    "capture_within",
    "is_ours",
    "kind_of",
    "resolve",
    "settle",
]

# Bounds what the table of known stacks can hold; a program with more starts the table anew.
_MOST_STACKS = 10_000


class _Known:
    """A stack that several births share: code objects and offsets, innermost first."""

    __slots__ = ("codes", "frames", "offsets")

    def __init__(self, codes: list[CodeType], offsets: tuple[int, ...]) -> None:
        self.codes = codes
        self.offsets = offsets
        self.frames: tuple[Frame, ...] | None = None


# Fresh from the walk: code, offset, code, offset, ... outwards. Once settled: one _Known.
Stack = list[Any]

NO_STACK: Stack = []

Capture = Callable[[FrameType, int], Stack]

_known: dict[tuple[int, ...], _Known] = {}


def capture(frame: FrameType, depth: int) -> Stack:
    """Remember at most `depth` calls, from `frame` outwards: code and offset, never the frame."""
    stack: Stack = []
    for _ in range(depth):
        stack.append(frame.f_code)
        stack.append(frame.f_lasti)
        frame = frame.f_back  # type: ignore[assignment]
        if frame is None:
            break
    return stack


def capture_within(ends: Iterable[CodeType]) -> Capture:
    """Like `capture`, but no further out than the first call of any of `ends`, left out itself."""
    # By the identity of the code, because a code object hashes its constants.
    known = {id(code): code for code in ends}

    def capture(frame: FrameType, depth: int) -> Stack:
        stack: Stack = []
        for _ in range(depth):
            code = frame.f_code
            if id(code) in known:
                break
            stack.append(code)
            stack.append(frame.f_lasti)
            frame = frame.f_back  # type: ignore[assignment]
            if frame is None:
                break
        return stack

    return capture


def settle(stack: Stack) -> None:
    """Make a stack small, in place, by sharing what is equal.

    Equals are found by their offsets, and then compared: hashing a code object would hash all of
    its constants. Still too dear for every birth, so it is done for the sockets that live on.
    """
    if len(stack) <= 1:
        return
    codes, offsets = stack[::2], tuple(stack[1::2])
    known = _known.get(offsets)
    # By identity: code objects of two files are equal where the files read alike.
    if known is None or not all(map(is_, known.codes, codes)):
        if len(_known) >= _MOST_STACKS:
            _known.clear()
        known = _known[offsets] = _Known(codes, offsets)
    stack[:] = [known]


def resolve(stack: Stack) -> tuple[Frame, ...]:
    """Turn a stack into frames with line numbers and source lines; the guard's own are left out."""
    settle(stack)
    if not stack:
        return ()
    known: _Known = stack[0]
    if known.frames is None:
        calls = zip(known.codes, known.offsets, strict=True)
        known.frames = tuple(
            _frame(code, offset) for code, offset in calls if not is_ours(code.co_filename)
        )
    return known.frames


def _frame(code: CodeType, offset: int) -> Frame:
    lineno = _line_at(code, offset)
    return Frame(
        filename=code.co_filename,
        lineno=lineno,
        function=code.co_qualname,
        module=_module_of(code.co_filename),
        kind=kind_of(code.co_filename),
        source=linecache.getline(code.co_filename, lineno).strip() or None,
    )


def _line_at(code: CodeType, offset: int) -> int:
    for start, end, line in code.co_lines():
        if start <= offset < end and line is not None:
            return line
    return code.co_firstlineno


def kind_of(filename: str) -> FrameKind:
    """Tell whose code a file is, by where it lies."""
    path = _normal(filename)
    if "/site-packages/" in path or "/dist-packages/" in path:
        return FrameKind.LIBRARY
    if path.startswith(_STDLIB):
        return FrameKind.STDLIB
    return FrameKind.USER


def is_ours(filename: str) -> bool:
    return _normal(filename).startswith(_ours(sys.modules.get("wrapt")))


@lru_cache(2)
def _ours(wrapt: ModuleType | None) -> tuple[str, ...]:
    folders = [str(Path(__file__).parent)]
    if wrapt is not None and wrapt.__file__:
        folders.append(str(Path(wrapt.__file__).parent))
    return tuple(_normal(folder) + "/" for folder in folders)


@lru_cache(4096)
def _module_of(filename: str) -> str:
    """The name under which a file was imported; its stem when no module owns to it."""
    for name, module in sys.modules.copy().items():
        # Lazy modules load themselves when asked for an attribute: look into their dict instead.
        if isinstance(module, ModuleType) and vars(module).get("__file__") == filename:
            return name
    return Path(filename).stem


def _normal(filename: str) -> str:
    return filename.replace("\\", "/")


# Not from sysconfig, which reads how Python was built, and takes longer than all the rest.
_STDLIB = ("<frozen ", _normal(str(Path(linecache.__file__).parent)) + "/")
