"""What Python itself has beside its socket class: bare C sockets, gevent's class, pipe ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._objects import field, number_of
from closewait_guard.integrations._owner import OwnerKind, own_descriptor

__all__ = ["OWNERS"]


def _handle(connection: Any) -> Iterable[int]:
    fd = number_of(field(connection, "_handle"))
    return () if fd is None else (fd,)


OWNERS = (
    OwnerKind(("_socket:socket",), own_descriptor),
    OwnerKind(("multiprocessing.connection:Connection",), _handle),
)
