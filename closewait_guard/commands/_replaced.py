"""Who has put something of his own in the place of the socket class, its methods or its makers."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from closewait_guard._patch import stand_in
from closewait_guard._wrappers import SOCKET

__all__ = ["replacements"]

_MAKERS = ("create_connection", "create_server", "socketpair", "fromfd", "getaddrinfo")


_STANDARD: str = SOCKET.__init__.__code__.co_filename


def replacements() -> Iterator[str]:
    """Each with the file and line of what stands there now."""
    class_name = stand_in()
    if class_name is not None:
        yield f"socket.socket is {class_name} ({_place(socket.socket)})"
    for name, value in vars(SOCKET).items():
        if not _is_standard(value):
            yield f"socket.socket.{name} is {_name(value)} ({_place(value)})"
    for name in _MAKERS:
        value = getattr(socket, name, None)
        if value is not None and not _is_standard(value):
            yield f"socket.{name} is {_name(value)} ({_place(value)})"


def _is_standard(value: Any) -> bool:
    """Whether it is of the socket module's own file, or no function of anybody's."""
    if isinstance(value, FunctionType):
        return value.__code__.co_filename == _STANDARD
    # Wrapt's wrappers are no functions, but stand for one.
    return not hasattr(value, "__wrapped__")


def _name(value: Any) -> str:
    module = getattr(value, "__module__", None) or type(value).__module__
    return f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _place(value: Any) -> str:
    code = getattr(value, "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    module = sys.modules.get(getattr(value, "__module__", None) or type(value).__module__)
    return str(getattr(module, "__file__", "no file"))
