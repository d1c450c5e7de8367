"""macOS, Windows and everywhere else: poll or select, then a peek where it is safe.

A peek distinguishes an end of stream from data. It is left out where it could do harm: on a socket
with an error pending it would eat the error, and on one with a timeout it could wait for it.
"""

from __future__ import annotations

import _socket
import socket
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from closewait_guard._descriptors import ask_or_none, is_listening, unread
from closewait_guard._enums import Connection, Evidence, State
from closewait_guard._inspect.probe.base import Poller, PollPoller, ProbeResult, select

if TYPE_CHECKING:
    from closewait_guard._capture import FinalSnapshot

__all__ = [
    "has_unsent",
    "poller",
    "probe_snapshot",
    "probe_socket",
    "unanswered",
]


_fileno = _socket.socket.fileno
_recv = _socket.socket.recv
_getpeername = _socket.socket.getpeername
_getsockname = _socket.socket.getsockname
_getsockopt = _socket.socket.getsockopt
_REUSE = (socket.SOL_SOCKET, socket.SO_REUSEADDR)
_gettimeout = _socket.socket.gettimeout
_family = _socket.socket.__dict__["family"].__get__
_type = _socket.socket.__dict__["type"].__get__

_IP = frozenset({socket.AF_INET, socket.AF_INET6})
_UNIX = getattr(socket, "AF_UNIX", None)
_STREAM_FAMILIES = _IP | {_UNIX}
_PEEK = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)
_NEVER_WAITS = hasattr(socket, "MSG_DONTWAIT")

# The events of poll, which select has no names for.
_READABLE, _FAILED, _HUNG_UP = 0x001, 0x008, 0x010
# Windows takes 512 descriptors in one select, others 1024.
_MAX_PER_SELECT = 500


class _SelectPoller:
    def suspects(self, fds: Collection[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        for some in _batches(sorted(fds)):
            readable, failed = _select(some)
            found |= dict.fromkeys(readable, _READABLE)
            found |= dict.fromkeys(failed, _FAILED)
        return found


def _batches(fds: list[int]) -> Iterable[list[int]]:
    for start in range(0, len(fds), _MAX_PER_SELECT):
        yield fds[start : start + _MAX_PER_SELECT]


def _select(fds: list[int]) -> tuple[list[int], list[int]]:
    try:
        readable, _, failed = select.select(fds, [], fds, 0)
    except (OSError, ValueError):
        # One of them was closed meanwhile, or its number is too high for select.
        if len(fds) == 1:
            return [], []
        middle = len(fds) // 2
        first, second = _select(fds[:middle]), _select(fds[middle:])
        return first[0] + second[0], first[1] + second[1]
    return readable, failed


def poller() -> Poller:
    """Poll where there is poll, select on Windows."""
    return PollPoller(select.POLLIN) if hasattr(select, "poll") else _SelectPoller()


def probe_socket(
    sock: _socket.socket, fd: int, events: int, _: ProbeResult | None = None
) -> ProbeResult | None:
    """Probe a socket by its poll events, its peer's name and, where that is safe, a peek."""
    family = _family(sock)
    listening = is_listening(sock)
    connection, evidence, waiting = Connection.NOT_APPLICABLE, Evidence.POLL, None
    if _type(sock) == socket.SOCK_STREAM and family in _STREAM_FAMILIES and not listening:
        connection, evidence, waiting = _connection(sock, fd, events)
    # Closed or detached meanwhile: what was seen may belong to the number's next owner.
    if _fileno(sock) != fd:
        return None
    return ProbeResult(_state(family, connection, listening), evidence, connection, unread=waiting)


def probe_snapshot(snapshot: FinalSnapshot) -> ProbeResult:
    """What the snapshot of a dropped socket shows."""
    family, listening = snapshot.family, snapshot.listening
    connection = Connection.NOT_APPLICABLE
    if snapshot.type == socket.SOCK_STREAM and family in _STREAM_FAMILIES and not listening:
        connection = Connection.UNCONNECTED if snapshot.peer is None else Connection.LIVE
    state = _state(family, connection, listening)
    return ProbeResult(state, Evidence.POLL, connection, unread=snapshot.unread)


def _state(family: int, connection: Connection, listening: bool) -> State:
    """The state that the kernel must be in, as far as it shows."""
    if family == _UNIX:
        return State.UNIX
    return State.LISTEN if listening else _INFERRED[connection]


def has_unsent(_: _socket.socket) -> bool:
    """Not as far as it matters: when the peer was last heard from does not show here."""
    return False


def unanswered(_: _socket.socket) -> None:
    """Nothing, as above."""


_INFERRED = {
    Connection.UNCONNECTED: State.CLOSE,
    Connection.LIVE: State.ESTABLISHED,
    Connection.PEER_CLOSED: State.CLOSE_WAIT,
    Connection.GONE: State.CLOSE,
    Connection.NOT_APPLICABLE: State.NONE,
}

_Answer = tuple[Connection, Evidence, int | None]


def _connection(sock: _socket.socket, fd: int, events: int) -> _Answer:
    if events & _FAILED:
        return Connection.GONE, Evidence.POLL, None
    if not _has_peer(sock):
        return _without_peer(sock, events), Evidence.POLL, None
    if not events:
        return Connection.LIVE, Evidence.POLL, 0
    waiting = unread(fd)
    if waiting:
        # An end of stream behind the data shows only where poll reports it.
        hung_up = events & _HUNG_UP
        return Connection.PEER_CLOSED if hung_up else Connection.LIVE, Evidence.POLL, waiting
    timeout = _gettimeout(sock)
    if timeout == 0 or (timeout is None and _NEVER_WAITS):
        return _peek(sock)
    ended = waiting == 0 and _is_readable(fd) and unread(fd) == 0
    return Connection.PEER_CLOSED if ended else Connection.LIVE, Evidence.POLL, waiting


def _without_peer(sock: _socket.socket, events: int) -> Connection:
    if events and not events & _HUNG_UP:
        # A connect under way, as far as the platform shows.
        return Connection.LIVE
    if events & _READABLE:
        # After a reset or a close: there was a connection.
        return Connection.GONE
    return Connection.NOT_APPLICABLE if _may_listen_yet(sock) else Connection.UNCONNECTED


_WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, and not bound to


def _may_listen_yet(sock: _socket.socket) -> bool:
    """Whether it was bound.

    After a refused connect a port may be left, of every address; what sets SO_REUSEADDR, as servers
    do, has bound that itself.
    """
    address = ask_or_none(_getsockname, sock)
    if not isinstance(address, tuple):
        return bool(address)
    has_own = address[0] not in _WILDCARDS
    return bool(address[1]) and (has_own or bool(ask_or_none(_getsockopt, sock, *_REUSE)))


def _has_peer(sock: _socket.socket) -> bool:
    try:
        _getpeername(sock)
    except OSError:
        return False
    return True


def _peek(sock: _socket.socket) -> _Answer:
    try:
        data = _recv(sock, 1, _PEEK)
    except BlockingIOError:
        return Connection.LIVE, Evidence.PEEK, 0
    except OSError:
        return Connection.GONE, Evidence.PEEK, None
    if data:
        return Connection.LIVE, Evidence.PEEK, None
    return Connection.PEER_CLOSED, Evidence.PEEK, 0


def _is_readable(fd: int) -> bool:
    return bool(poller().suspects({fd}).get(fd))
