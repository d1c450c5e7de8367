"""Resolve a captured stack late; tell user frames from library frames."""

from __future__ import annotations

import linecache
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import CodeType, ModuleType

from closewait_guard._objects import loaded_modules, text_of, value_at
from closewait_guard._socket_values import Frame
from closewait_guard._stack import Known, Stack, settle
from closewait_guard._vocabulary import FrameKind

__all__ = ["is_ours", "kind_of", "read_again", "resolve"]

# Those with a source file that could not be read.
_unread: list[Known] = []


def resolve(stack: Stack) -> tuple[Frame, ...]:
    """Turn a stack into frames with line numbers and source lines; the guard's own are left out."""
    settle(stack)
    if not stack:
        return ()
    known: Known = stack[0]
    frames = known.frames
    if frames is None:
        calls = zip(known.codes, known.offsets, strict=True)
        frames = known.frames = tuple(
            _frame(code, offset) for code, offset in calls if not is_ours(code.co_filename)
        )
        if any(map(_is_unread, frames)):
            _unread.append(known)
    return frames


def read_again() -> None:
    """Try once more what could not be read: a descriptor may be left for it now."""
    with suppress(IndexError):
        while True:
            _unread.pop().frames = None


def _is_unread(frame: Frame) -> bool:
    has_file = not frame.filename.startswith("<")
    return frame.source is None and has_file and frame.filename not in linecache.cache


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
    # In their dicts: lazy modules load themselves when asked for an attribute.
    for name, variables in loaded_modules():
        if text_of(value_at(variables, "__file__")) == filename:
            return name
    return Path(filename).stem


def _normal(filename: str) -> str:
    return filename.replace("\\", "/")


# Not from sysconfig, which reads how Python was built, and takes longer than all the rest.
_STDLIB = ("<frozen ", _normal(str(Path(linecache.__file__).parent)) + "/")
