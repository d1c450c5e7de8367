"""What the guard cannot see, in plain sentences: pure."""

from __future__ import annotations

__all__ = ["notes"]

_ALWAYS = "sockets that native code opens (libuv, libpq, libcurl, grpc) or _socket makes directly"


def notes(
    *,
    installed: bool,
    replaced_by: str | None,
    stand_in: str | None,
    context_failure: str | None,
) -> tuple[str, ...]:
    """One phrase for each blind spot of this moment."""
    found = [_ALWAYS]
    if not installed:
        found.append("where sockets were born, because the guard is not installed")
    if replaced_by is not None:
        found.append(f"what {replaced_by} hides, which has wrapped the socket class after us")
    if stand_in is not None:
        found.append(f"sockets of {stand_in}, which has taken the place of socket.socket")
    if context_failure is not None:
        found.append(context_failure)
    return tuple(found)
