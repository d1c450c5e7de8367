"""What the kernel says of a socket that dies open: asked in its finalizer, read when it is told.

Nothing may be imported in a finalizer, so this is loaded before. What reads it is not: most runs of
tests drop no socket.
"""

from __future__ import annotations

import _socket
import socket
import sys
from collections.abc import Callable
from typing import Any

from closewait_guard._descriptor import inode_of
from closewait_guard._interruptions import interrupts
from closewait_guard._objects import is_a, module_dict
from closewait_guard._queues import unread, unsent

__all__ = ["Remains", "asked", "is_listening", "is_tls"]

# More than any kernel's has.
_TCP_INFO_SIZE = 512
_TCP_INFO = getattr(socket, "TCP_INFO", 0) if sys.platform == "linux" else 0

# Past the properties of Python's class, which make an enum of each number.
_family = vars(_socket.socket)["family"].__get__
_type = vars(_socket.socket)["type"].__get__
_proto = vars(_socket.socket)["proto"].__get__
_getsockopt = _socket.socket.getsockopt


class Remains:
    """The answers as they were given; None where there was none."""

    __slots__ = (
        "family",
        "inode",
        "listening",
        "local",
        "peer",
        "proto",
        "tcp_info",
        "tls",
        "type",
        "unread",
        "unsent",
    )

    def __init__(self, sock: _socket.socket, fd: int) -> None:
        self.family: int = _family(sock)
        self.type: int = _type(sock)
        self.proto: int = _proto(sock)
        self.local = asked(_socket.socket.getsockname, sock)
        self.peer = asked(_socket.socket.getpeername, sock)
        self.inode = inode_of(fd)
        self.tls = is_tls(sock)
        self.listening = is_listening(sock)
        self.tcp_info = self.unread = self.unsent = None
        if self.type == socket.SOCK_STREAM:
            self.unread, self.unsent = unread(fd), unsent(fd)
            if _TCP_INFO:
                self.tcp_info = asked(
                    _getsockopt, sock, socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_SIZE
                )


def asked(ask: Callable[..., Any], *question: object) -> Any:
    """The kernel's answer; None where it has none."""
    try:
        return ask(*question)
    except OSError as error:
        if interrupts(error):
            raise
        return None


def is_listening(sock: _socket.socket) -> bool:
    """Whether the socket waits for connections."""
    return bool(asked(_getsockopt, sock, socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def is_tls(sock: _socket.socket) -> bool:
    """Whether it is a socket of Python's ssl, which a program without TLS does not load."""
    if type(sock) is socket.socket:
        return False
    # Neither the socket nor whatever stands there for the module is asked anything.
    variables = module_dict(sys.modules.get("ssl"))
    return variables is not None and is_a(sock, variables.get("SSLSocket", type(None)))
