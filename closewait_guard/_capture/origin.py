"""The origin of a socket: created, accepted, duplicated, wrapped, detached; and of which other."""

from __future__ import annotations

import _socket
import socket
import threading
from collections.abc import Mapping
from types import FrameType

from closewait_guard._capture.creation import PARENT, SOCK, CreationTuple, as_parent, still_owns
from closewait_guard._capture.hooks import SOCKET, code_of, listener_in_accept_by_thread
from closewait_guard._descriptors import inode_of
from closewait_guard._enums import Origin
from closewait_guard._live import is_a, variable_of

__all__ = [
    "origin_of",
]


# Which function of the standard library makes a socket of a descriptor, and which of its local
# variables has the socket or descriptor that goes before. By the identity of the code, because a
# code object hashes its constants.
_STDLIB_CONSTRUCTORS: dict[int, tuple[Origin, str | None]] = {
    id(code_of(function)): origin_and_name
    for function, origin_and_name in (
        (SOCKET.accept, (Origin.ACCEPTED, "self")),
        (SOCKET.dup, (Origin.DUPLICATED, "self")),
        (socket.fromfd, (Origin.DUPLICATED, "fd")),
        (socket.socketpair, (Origin.CREATED, None)),
    )
}

_ACCEPTED = Origin.ACCEPTED
_c_socket = _socket.socket
_fileno = _socket.socket.fileno
_get_ident = threading.get_ident


def origin_of(
    fd: int,
    caller: FrameType,
    creations: Mapping[int, CreationTuple],
    detached: Mapping[int, tuple[CreationTuple, int]],
) -> tuple[Origin, CreationTuple | None]:
    """The origin of a socket made of a descriptor, and the creation that goes before.

    Args:
        fd: The descriptor.
        caller: The frame that made the socket.
        creations: The creations by descriptor, before this one.
        detached: The creations and inodes of descriptors that left their socket objects.
    """
    constructor = _STDLIB_CONSTRUCTORS.get(id(caller.f_code))
    if constructor is None:
        caller = _skip_init(caller)
        constructor = _STDLIB_CONSTRUCTORS.get(id(caller.f_code))
    if constructor is not None:
        origin, name = constructor
        if (
            origin is _ACCEPTED
            and (listener := listener_in_accept_by_thread.get(_get_ident())) is not None
        ):
            creation = creations.get(_fileno(listener))
            if creation is None or creation[SOCK]() is not listener:
                return origin, None
            return origin, creation if creation[PARENT] is None else as_parent(creation)
        return origin, _creation_in_variable(caller, name, creations) if name else None
    creation = creations.get(fd)
    if creation is None:
        return Origin.ADOPTED, None
    if still_owns(creation, fd):
        return Origin.WRAPPED, as_parent(creation)
    left = detached.get(fd)
    if left is not None and left[0] is creation and left[1] == inode_of(fd):
        return Origin.DETACHED, as_parent(creation)
    return Origin.ADOPTED, None


def _skip_init(frame: FrameType) -> FrameType:
    """Past the constructors of subclasses, to what called them."""
    while frame.f_code.co_name == "__init__" and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _creation_in_variable(
    caller: FrameType, name: str, creations: Mapping[int, CreationTuple]
) -> CreationTuple | None:
    """The creation of the socket, or descriptor, that a local variable of the caller holds."""
    value = variable_of(caller, name)
    fd = _c_socket.fileno(value) if is_a(value, _c_socket) else value
    if not is_a(fd, int):
        return None
    creation = creations.get(fd)
    return as_parent(creation) if creation is not None and still_owns(creation, fd) else None
