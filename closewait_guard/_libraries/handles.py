"""The descriptors of what libraries have in the place of a socket object."""

from __future__ import annotations

import _socket
from collections.abc import Mapping, Sequence
from typing import Any

from closewait_guard._cpython import LOOP_OF
from closewait_guard._libraries.kinds import HandleKind, Library
from closewait_guard._live import (
    derives_from,
    field,
    find_classes,
    is_a,
    kinds_of,
    layers_of,
)

__all__ = [
    "HandleClasses",
    "descriptor_of",
    "handle_classes",
]


# By the identity of a class, which a class with an odd metaclass has too.
HandleClasses = Mapping[int, tuple[type, HandleKind]]


def handle_classes(libraries: Sequence[Library], *, with_inner: bool = False) -> HandleClasses:
    """The classes of handles of some libraries that are loaded, with what is known of them."""
    kinds = [kind for library in libraries for kind in library.handles]
    if with_inner:
        kinds += [kind for library in libraries for kind in library.inner]
    loaded = find_classes(name for kind in kinds for name in kind.classes)
    return {
        id(cls): (cls, kind)
        for kind in reversed(kinds)
        for name in kind.classes
        if name in loaded
        for cls in kinds_of(loaded[name])
        if not derives_from(cls, [_socket.socket])
    }


def descriptor_of(thing: Any, handles: HandleClasses) -> tuple[int | None, Any]:
    """That of a socket, or of the socket beneath a connection, and the event loop it is used by.

    Each is None where there is none.
    """
    if type(thing) is int:
        return thing, None
    loop = None
    for inner in layers_of(thing):
        if is_a(inner, _socket.socket):
            return _socket.socket.fileno(inner), loop
        loop = field(inner, LOOP_OF, loop)
        handle = handles.get(id(type(inner)))
        for fd in handle[1].descriptors(inner) if handle is not None else ():
            return fd, loop
    return None, loop
