"""What happens when the program makes a socket: patched methods, records, the weak table."""

from __future__ import annotations

from closewait_guard._capture.context import PlainContext, around, current_labels, label
from closewait_guard._capture.creation import (
    NO_CONTEXT,
    ORIGIN,
    SERIAL,
    SOCK,
    STACK,
    Creation,
    CreationTuple,
    pop_if_same,
    still_owns,
)
from closewait_guard._capture.dropped import (
    DroppedSocket,
    FinalSnapshot,
    LockFreeCounter,
)
from closewait_guard._capture.hooks import SOCKET, as_function
from closewait_guard._capture.patch import replacement_class
from closewait_guard._capture.registry import OpenSockets, Registry, open_creations
from closewait_guard._capture.stack import (
    NO_STACK,
    CapturedStack,
    SharedStack,
    capture,
    capture_up_to,
    intern,
)

__all__ = [
    "NO_CONTEXT",
    "NO_STACK",
    "ORIGIN",
    "SERIAL",
    "SOCK",
    "SOCKET",
    "STACK",
    "CapturedStack",
    "Creation",
    "CreationTuple",
    "DroppedSocket",
    "FinalSnapshot",
    "LockFreeCounter",
    "OpenSockets",
    "PlainContext",
    "Registry",
    "SharedStack",
    "around",
    "as_function",
    "capture",
    "capture_up_to",
    "current_labels",
    "intern",
    "label",
    "open_creations",
    "pop_if_same",
    "replacement_class",
    "still_owns",
]
