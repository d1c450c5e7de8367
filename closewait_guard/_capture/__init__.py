"""What happens when the program makes a socket: patched methods, records, the weak table.

The names are fetched when they are first used: what waits for the first socket, as the pytest
plugin does, needs the class that is patched, and none of what records.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from closewait_guard._capture.checkouts import OpenCheckout
    from closewait_guard._capture.context import LABELS, PlainContext, around, label
    from closewait_guard._capture.creation import (
        NO_CONTEXT,
        ORIGIN,
        PID,
        SERIAL,
        SOCK,
        STACK,
        Creation,
        CreationTuple,
        ForkedSocket,
        OpenSockets,
        no_socket,
        pop_if_same,
        still_owns,
    )
    from closewait_guard._capture.dropped import (
        DroppedSocket,
        FdExhaustionAlarm,
        FinalSnapshot,
        LockFreeCounter,
        Probing,
    )
    from closewait_guard._capture.hooks import SOCKET, SocketEvents, as_function
    from closewait_guard._capture.owners import (
        EndedOwner,
        OpenOwner,
        OwnedSocket,
        OwnerTable,
    )
    from closewait_guard._capture.patch import replacement_class
    from closewait_guard._capture.recorder import Recording, note_task
    from closewait_guard._capture.registry import (
        Registry,
        open_creations,
        open_without_socket,
    )
    from closewait_guard._capture.speedups import find_speedups, why_no_speedups
    from closewait_guard._capture.stack import (
        NO_STACK,
        CapturedStack,
        SharedStack,
        capture,
        intern,
        kind_of_file,
        normal_path,
    )

__all__ = [
    "LABELS",
    "NO_CONTEXT",
    "NO_STACK",
    "ORIGIN",
    "PID",
    "SERIAL",
    "SOCK",
    "SOCKET",
    "STACK",
    "CapturedStack",
    "Creation",
    "CreationTuple",
    "DroppedSocket",
    "EndedOwner",
    "FdExhaustionAlarm",
    "FinalSnapshot",
    "ForkedSocket",
    "LockFreeCounter",
    "OpenCheckout",
    "OpenOwner",
    "OpenSockets",
    "OwnedSocket",
    "OwnerTable",
    "PlainContext",
    "Probing",
    "Recording",
    "Registry",
    "SharedStack",
    "SocketEvents",
    "around",
    "as_function",
    "capture",
    "find_speedups",
    "intern",
    "kind_of_file",
    "label",
    "no_socket",
    "normal_path",
    "note_task",
    "open_creations",
    "open_without_socket",
    "pop_if_same",
    "replacement_class",
    "still_owns",
    "why_no_speedups",
]

_HOMES = {
    "checkouts": ("OpenCheckout",),
    "context": (
        "LABELS",
        "PlainContext",
        "around",
        "label",
    ),
    "creation": (
        "NO_CONTEXT",
        "ORIGIN",
        "PID",
        "SERIAL",
        "SOCK",
        "STACK",
        "Creation",
        "CreationTuple",
        "ForkedSocket",
        "OpenSockets",
        "no_socket",
        "pop_if_same",
        "still_owns",
    ),
    "dropped": (
        "DroppedSocket",
        "FdExhaustionAlarm",
        "FinalSnapshot",
        "LockFreeCounter",
        "Probing",
    ),
    "hooks": (
        "SOCKET",
        "SocketEvents",
        "as_function",
    ),
    "owners": (
        "EndedOwner",
        "OpenOwner",
        "OwnedSocket",
        "OwnerTable",
    ),
    "patch": ("replacement_class",),
    "recorder": (
        "Recording",
        "note_task",
    ),
    "registry": (
        "Registry",
        "open_creations",
        "open_without_socket",
    ),
    "speedups": (
        "find_speedups",
        "why_no_speedups",
    ),
    "stack": (
        "NO_STACK",
        "CapturedStack",
        "SharedStack",
        "capture",
        "intern",
        "kind_of_file",
        "normal_path",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
