"""A report from inside another process, and what carries it from one to the other."""

from __future__ import annotations

from closewait_guard._remote.wire import Listener, MessageSocket, Peer, RemoteError

__all__ = [
    "Listener",
    "MessageSocket",
    "Peer",
    "RemoteError",
]
