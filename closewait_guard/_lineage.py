"""Where a descriptor comes from that a socket was made of, and whose birth goes before."""

from __future__ import annotations

import _socket
import socket
import threading
from collections.abc import Mapping
from types import FrameType

from closewait_guard._descriptor import inode_of
from closewait_guard._objects import is_a
from closewait_guard._origin import Origin
from closewait_guard._story import PARENT, SOCK, Story, descended_from, holds
from closewait_guard._variables import variable_of
from closewait_guard._wrappers import SOCKET, accepting, code_of

__all__ = ["lineage"]

# Which function of the standard library makes a socket of a descriptor, and which of its local
# variables tells whose. By the identity of the code, because a code object hashes its constants.
_MAKERS: dict[int, tuple[Origin, str | None]] = {
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


def lineage(
    fd: int,
    caller: FrameType,
    births: Mapping[int, Story],
    detached: Mapping[int, tuple[Story, int]],
) -> tuple[Origin, Story | None]:
    """The origin of a socket made of a descriptor, and the birth that goes before.

    Args:
        fd: The descriptor.
        caller: The frame that made the socket.
        births: The stories by descriptor, before this one.
        detached: The stories and inodes of descriptors that left their socket objects.
    """
    maker = _MAKERS.get(id(caller.f_code))
    if maker is None:
        caller = _beyond_init(caller)
        maker = _MAKERS.get(id(caller.f_code))
    if maker is not None:
        origin, name = maker
        if origin is _ACCEPTED and (listener := accepting.get(_get_ident())) is not None:
            story = births.get(_fileno(listener))
            if story is None or story[SOCK]() is not listener:
                return origin, None
            return origin, story if story[PARENT] is None else descended_from(story)
        return origin, _named_by(caller, name, births) if name else None
    story = births.get(fd)
    if story is None:
        return Origin.ADOPTED, None
    if holds(story, fd):
        return Origin.WRAPPED, descended_from(story)
    handed = detached.get(fd)
    if handed is not None and handed[0] is story and handed[1] == inode_of(fd):
        return Origin.DETACHED, descended_from(story)
    return Origin.ADOPTED, None


def _beyond_init(frame: FrameType) -> FrameType:
    """Past the constructors of subclasses, to who called them."""
    while frame.f_code.co_name == "__init__" and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _named_by(caller: FrameType, name: str, births: Mapping[int, Story]) -> Story | None:
    """The birth of the socket, or descriptor, that a local variable of the caller holds."""
    value = variable_of(caller, name)
    fd = _c_socket.fileno(value) if is_a(value, _c_socket) else value
    if not is_a(fd, int):
        return None
    story = births.get(fd)
    return descended_from(story) if story is not None and holds(story, fd) else None
