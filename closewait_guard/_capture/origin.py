"""Where a descriptor comes from that a socket was made of, and whose birth goes before."""

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
# variables tells whose. By the identity of the code, because a code object hashes its constants.
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
    births: Mapping[int, CreationTuple],
    detached: Mapping[int, tuple[CreationTuple, int]],
) -> tuple[Origin, CreationTuple | None]:
    """The origin of a socket made of a descriptor, and the birth that goes before.

    Args:
        fd: The descriptor.
        caller: The frame that made the socket.
        births: The stories by descriptor, before this one.
        detached: The stories and inodes of descriptors that left their socket objects.
    """
    maker = _STDLIB_CONSTRUCTORS.get(id(caller.f_code))
    if maker is None:
        caller = _beyond_init(caller)
        maker = _STDLIB_CONSTRUCTORS.get(id(caller.f_code))
    if maker is not None:
        origin, name = maker
        if (
            origin is _ACCEPTED
            and (listener := listener_in_accept_by_thread.get(_get_ident())) is not None
        ):
            story = births.get(_fileno(listener))
            if story is None or story[SOCK]() is not listener:
                return origin, None
            return origin, story if story[PARENT] is None else as_parent(story)
        return origin, _named_by(caller, name, births) if name else None
    story = births.get(fd)
    if story is None:
        return Origin.ADOPTED, None
    if still_owns(story, fd):
        return Origin.WRAPPED, as_parent(story)
    handed = detached.get(fd)
    if handed is not None and handed[0] is story and handed[1] == inode_of(fd):
        return Origin.DETACHED, as_parent(story)
    return Origin.ADOPTED, None


def _beyond_init(frame: FrameType) -> FrameType:
    """Past the constructors of subclasses, to who called them."""
    while frame.f_code.co_name == "__init__" and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _named_by(
    caller: FrameType, name: str, births: Mapping[int, CreationTuple]
) -> CreationTuple | None:
    """The birth of the socket, or descriptor, that a local variable of the caller holds."""
    value = variable_of(caller, name)
    fd = _c_socket.fileno(value) if is_a(value, _c_socket) else value
    if not is_a(fd, int):
        return None
    story = births.get(fd)
    return as_parent(story) if story is not None and still_owns(story, fd) else None
