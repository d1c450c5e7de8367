"""What Python itself has beside its socket class: bare C sockets, gevent's class, pipe ends."""

from __future__ import annotations

from closewait_guard.integrations._owner import OwnerKind, own_fileno

__all__ = ["OWNERS"]

OWNERS = (OwnerKind(("_socket:socket", "multiprocessing.connection:Connection"), own_fileno),)
