"""A report from inside another process, and what carries it from one to the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from closewait_guard._remote.wire import Listener, MessageSocket, Peer, RemoteError

if TYPE_CHECKING:
    from closewait_guard._remote.attach import Answer, ask, find_targets
else:
    # A program that answers loads nothing of what asks.
    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.attach"), name)


__all__ = [
    "Answer",
    "Listener",
    "MessageSocket",
    "Peer",
    "RemoteError",
    "ask",
    "find_targets",
]
