"""What Python itself has beside its socket class: bare C sockets, gevent's class, pipe ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from closewait_guard._libraries.kinds import OwnerKind, own_descriptor
from closewait_guard._live import field, number_of

__all__ = [
    "OWNERS",
]


def _handle(connection: Any) -> Iterable[int]:
    fd = number_of(field(connection, "_handle"))
    return () if fd is None else (fd,)


OWNERS = (
    OwnerKind(("_socket:socket",), own_descriptor),
    OwnerKind(("multiprocessing.connection:Connection",), _handle),
)
