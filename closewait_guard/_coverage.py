"""What the guard cannot see, in plain sentences: pure."""

from __future__ import annotations

from closewait_guard._words import count_of

__all__ = ["notes"]

_NO_TIME = "not searched for yet, or not found in the 1 % of the time that searching may take"
_NATIVE = "native code (libuv, libpq, libcurl, grpc) or _socket"
_OTHER_VARIABLES = (
    "what other threads have in their variables, which Python 3.13 shows safely from 3.13.5 on"
)
_OTHER_THREADS = (
    "what other threads do, have in their variables or read of closed sockets, because this "
    "process has several interpreters"
)


def notes(
    *,
    installed: bool,
    natives: int | None,
    replaced_by: str | None,
    stand_in: str | None,
    context_failure: str | None,
    sees_all_threads: bool,
    shows_variables: bool = True,
    failed_searches: int = 0,
    unsearched: int = 0,
    asked_pools: bool = True,
    undescribed: int = 0,
) -> tuple[str, ...]:
    """One phrase for each blind spot of this moment.

    Args:
        installed: Whether births are recorded.
        natives: How many sockets no object is known for; None where nobody says.
        replaced_by: The module that has wrapped the socket class after us.
        stand_in: What the name of the socket class stands for.
        context_failure: Why the context of births is unknown.
        sees_all_threads: Whether the calls of other threads are known.
        shows_variables: Whether the variables of other threads' calls can be read.
        failed_searches: For how many sockets finding out who holds them went wrong.
        unsearched: For how many sockets there was no time to find that out.
        asked_pools: Whether the pools could be asked what waits in them.
        undescribed: How many sockets nothing but the birth could be told of.
    """
    if natives is None:
        found = [f"sockets that {_NATIVE} opens"]
    else:
        found = [f"where {_NATIVE} opens sockets: {natives:,} such are open"]
    if not installed:
        found.append("where sockets were born, because the guard is not installed")
    if replaced_by is not None:
        found.append(f"what {replaced_by} hides, which has wrapped the socket class after us")
    if stand_in is not None:
        found.append(f"sockets of {stand_in}, which has taken the place of socket.socket")
    if context_failure is not None:
        found.append(context_failure)
    found += _of_threads(sees_all=sees_all_threads, shows_variables=shows_variables)
    found += _of_sockets(failed_searches, unsearched, undescribed)
    if not asked_pools:
        found.append("what waits in pools: asking them has failed")
    return tuple(found)


def _of_threads(*, sees_all: bool, shows_variables: bool) -> list[str]:
    if not sees_all:
        return [_OTHER_THREADS]
    return [] if shows_variables else [_OTHER_VARIABLES]


def _of_sockets(failed_searches: int, unsearched: int, undescribed: int) -> list[str]:
    said = (
        (failed_searches, "who holds {}: the search has failed"),
        (unsearched, f"who holds {{}}: {_NO_TIME}"),
        (undescribed, "the state of {}: looking at it has failed"),
    )
    return [text.format(count_of(count, "socket")) for count, text in said if count]
