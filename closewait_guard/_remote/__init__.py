"""A report from inside another process, and what carries it from one to the other.

Who only asks another process loads nothing that records the sockets of this one, and who answers
nothing of what asks.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from closewait_guard._remote.attach import (
        Answer,
        Reached,
        ask,
        change,
        find_targets,
        pythons_below,
        watch_processes,
    )
    from closewait_guard._remote.control import Control
    from closewait_guard._remote.place import ask_control, has_control, pids_named
    from closewait_guard._remote.target import may_leak
    from closewait_guard._remote.wire import Listener, MessageSocket, Peer, RemoteError

__all__ = [
    "Answer",
    "Control",
    "Listener",
    "MessageSocket",
    "Peer",
    "Reached",
    "RemoteError",
    "ask",
    "ask_control",
    "change",
    "find_targets",
    "has_control",
    "may_leak",
    "pids_named",
    "pythons_below",
    "watch_processes",
]


_HOMES = {
    "attach": (
        "Answer",
        "Reached",
        "ask",
        "change",
        "find_targets",
        "pythons_below",
        "watch_processes",
    ),
    "control": ("Control",),
    "place": ("ask_control", "has_control", "pids_named"),
    "target": ("may_leak",),
    "wire": ("Listener", "MessageSocket", "Peer", "RemoteError"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
