"""macOS, Windows and everywhere else: through psutil, the only place that imports it.

It dates nothing and counts no unread bytes, and shows what the platform lets it see.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from types import ModuleType
from typing import Any

from closewait_guard._inspect import Endpoint, ProbeResult
from closewait_guard._processes.model import (
    Descriptor,
    Inaccessible,
    Process,
    ProcessSnapshot,
    Snapshot,
    program_of,
)
from closewait_guard.exceptions import MissingExtraError
from closewait_guard.model import Connection, Evidence, State

__all__ = [
    "descendants",
    "take_snapshot",
]


def _psutil() -> ModuleType:
    try:
        import psutil
    except ImportError as missing:
        raise MissingExtraError(
            f"scanning processes here needs psutil: pip install 'closewait-guard[cli]' ({missing})"
        ) from missing
    return psutil  # type: ignore[no-any-return]


def take_snapshot(pids: Sequence[int] | None, *, everything: bool) -> Snapshot:
    """Scan some processes, or all that there are."""
    psutil = _psutil()
    snapshots: list[ProcessSnapshot] = []
    inaccessible: list[Inaccessible] = []
    for pid in dict.fromkeys(psutil.pids() if pids is None else pids):
        try:
            snapshots.append(_snapshot_of(psutil, pid, everything=everything))
        except psutil.ZombieProcess:
            if pids is not None:
                inaccessible.append(Inaccessible(pid, "", None, exists=True, why=_ENDED_UNASKED))
        except psutil.NoSuchProcess:
            if pids is not None:
                inaccessible.append(Inaccessible(pid, "", None, exists=False))
        except (psutil.AccessDenied, PermissionError):
            inaccessible.append(_inaccessible(psutil, pid))
    return Snapshot(time.monotonic(), snapshots, inaccessible, ())


_ENDED_UNASKED = "has ended, and its parent has not waited for it"


def descendants(pids: Sequence[int]) -> list[int]:
    """The processes, with all those that they have started, and so on."""
    psutil = _psutil()
    found = dict.fromkeys(pids)
    for pid in pids:
        with suppress(psutil.Error):
            found |= {each.pid: None for each in psutil.Process(pid).children(recursive=True)}
    return list(found)


def _inaccessible(psutil: ModuleType, pid: int) -> Inaccessible:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        uid = process.uids().real if hasattr(process, "uids") else None
        return Inaccessible(pid, process.name(), uid, exists=True)
    return Inaccessible(pid, "", None, exists=True)


def _snapshot_of(psutil: ModuleType, pid: int, *, everything: bool) -> ProcessSnapshot:
    process = psutil.Process(pid)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.ZombieProcess(pid)
    snapshot = _snapshot(process, everything=everything)
    # Another may have its number by now.
    if not process.is_running():
        raise psutil.NoSuchProcess(pid)
    return snapshot


def _snapshot(process: Any, *, everything: bool) -> ProcessSnapshot:
    connections = process.net_connections("all")
    listening = {(each.family, *each.laddr) for each in connections if each.status == "LISTEN"}
    found = list(_descriptors(connections, listening))
    ended = [each for each in found if each.view.connection in _ENDED]
    return ProcessSnapshot(
        _process_of(process, found),
        Counter(_label(each) for each in found),
        ended,
        [each for each in found if each.view.connection not in _ENDED] if everything else (),
        shared_by={},
        backlog={},
        uncertain_backlog={},
        dated=False,
    )


def _label(each: Descriptor) -> str:
    if each.view.state in _TCP:
        return each.view.state
    return "UNIX" if each.endpoint.family == "AF_UNIX" else "UDP"


_ENDED = frozenset({Connection.PEER_CLOSED, Connection.UNCONNECTED})
_TCP = frozenset(State) - {State.UNIX, State.NONE}


def _process_of(process: Any, found: Sequence[Descriptor]) -> Process:
    command = process.cmdline()
    name = program_of(command) or process.name()
    return Process(
        pid=process.pid,
        program=name,
        python="?" if name.lower().startswith("python") else "",
        parent=process.ppid(),
        fd_used=process.num_fds() if hasattr(process, "num_fds") else None,
        fd_limit=_limit(process),
        sockets={each.fd: 0 for each in found},
    )


def _limit(process: Any) -> int | None:
    """Linux and FreeBSD show the limits of another process."""
    if not hasattr(process, "rlimit"):
        return None
    import resource

    soft, _ = process.rlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else int(soft)


def _descriptors(
    connections: Iterable[Any], listening: Set[tuple[Any, ...]]
) -> Iterator[Descriptor]:
    for each in connections:
        state = _STATES.get(each.status, State.NONE)
        family, kind = each.family.name, each.type.name
        if family == "AF_UNIX":
            state, local, peer = State.UNIX, each.laddr or None, each.raddr or None
        else:
            local, peer = _address(each.laddr), _address(each.raddr)
        accepted = bool(peer) and family != "AF_UNIX" and _is_accepted(each, listening)
        connection = _CONNECTIONS.get(state, Connection.LIVE)
        view = ProbeResult(state, Evidence.TABLE, connection)
        yield Descriptor(each.fd, Endpoint(family, kind, local, peer), view, accepted)


def _is_accepted(each: Any, listening: Set[tuple[Any, ...]]) -> bool:
    """Whether the process listens at this end's address, or at all addresses."""
    hosts = (each.laddr.ip, "::" if ":" in each.laddr.ip else "0.0.0.0")  # noqa: S104
    return any((each.family, host, each.laddr.port) in listening for host in hosts)


_STATES = {state.value: state for state in State}
_CONNECTIONS = {
    State.CLOSE_WAIT: Connection.PEER_CLOSED,
    State.CLOSE: Connection.UNCONNECTED,
    State.LISTEN: Connection.NOT_APPLICABLE,
    State.UNIX: Connection.NOT_APPLICABLE,
    State.NONE: Connection.NOT_APPLICABLE,
}


def _address(address: Any) -> str | None:
    if not address:
        return None
    host = f"[{address.ip}]" if ":" in address.ip else address.ip
    return f"{host}:{address.port}"
