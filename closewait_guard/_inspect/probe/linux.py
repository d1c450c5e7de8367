"""Linux: POLLRDHUP finds the suspects, TCP_INFO gives their state and dates the peer's FIN.

No data is peeked at: FIONREAD counts the unread bytes, and a peek on a reset socket would eat the
error that the program is to see.
"""

from __future__ import annotations

import _socket
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from closewait_guard._descriptors import ask_or_none, is_listening, tcp_info_of, unread, unsent
from closewait_guard._enums import Connection, Evidence, State
from closewait_guard._inspect.probe.base import PollPoller, ProbeResult, select
from closewait_guard.model import Unanswered

if TYPE_CHECKING:
    from closewait_guard._capture import FinalSnapshot

__all__ = [
    "CONNECTIONS",
    "STATES",
    "TCP_INFO_SIZE",
    "has_unsent",
    "poller",
    "probe_snapshot",
    "probe_socket",
    "tcp_result",
    "unanswered",
]


# In the order of the kernel's numbers.
STATES = (
    State.NONE,
    State.ESTABLISHED,
    State.SYN_SENT,
    State.SYN_RECV,
    State.FIN_WAIT1,
    State.FIN_WAIT2,
    State.TIME_WAIT,
    State.CLOSE,
    State.CLOSE_WAIT,
    State.LAST_ACK,
    State.LISTEN,
    State.CLOSING,
    State.NEW_SYN_RECV,
)
CONNECTIONS = {
    State.CLOSE_WAIT: Connection.PEER_CLOSED,
    State.CLOSE: Connection.GONE,
    State.LISTEN: Connection.NOT_APPLICABLE,
}

# IPPROTO_MPTCP has no name in Python 3.11; a multipath socket answers for its first subflow.
_TCP_PROTOCOLS = frozenset({0, socket.IPPROTO_TCP, 262})
_STREAM_FAMILIES = frozenset({socket.AF_UNIX, socket.AF_VSOCK})

# struct tcp_info: tcpi_state at 0, tcpi_unacked at 24, tcpi_last_data_sent at 44,
# tcpi_last_data_recv at 52, tcpi_last_ack_recv at 56, tcpi_pmtu at 60, tcpi_bytes_acked at 120,
# tcpi_segs_in at 140, tcpi_notsent_bytes at 144. Kernels before 4.6 end earlier: what they lack
# reads as zero.
_TCP_INFO = struct.Struct("=B 23x I 16x I 4x I I I 56x Q 12x I I")
TCP_INFO_SIZE = _TCP_INFO.size

_fileno = _socket.socket.fileno
_getsockopt = _socket.socket.getsockopt
_family = _socket.socket.__dict__["family"].__get__
_type = _socket.socket.__dict__["type"].__get__
_proto = _socket.socket.__dict__["proto"].__get__


def poller() -> PollPoller:
    """A poller that asks for hang-ups only: unread data makes no suspect."""
    return PollPoller(select.POLLRDHUP)


def probe_socket(
    sock: _socket.socket, fd: int, events: int, before: ProbeResult | None = None
) -> ProbeResult | None:
    """Probe a socket by TCP_INFO where there is one, else by the poll events given."""
    if before is not None and before.fin_for is not None:
        result = _probe_closed_by_peer(sock, fd, before)
    else:
        result = _probe_any(sock, fd, events)
    # Closed or detached meanwhile: what was seen may belong to the number's next owner.
    return (result or _OTHER) if _fileno(sock) == fd else None


def _probe_any(sock: _socket.socket, fd: int, events: int) -> ProbeResult | None:
    if _type(sock) != socket.SOCK_STREAM:
        return None
    family = _family(sock)
    if family in _TCP_FAMILIES and _proto(sock) in _TCP_PROTOCOLS:
        return _probe_tcp(sock, fd)
    return _probe_stream(sock, fd, family, events) if family in _STREAM_FAMILIES else None


def _probe_closed_by_peer(sock: _socket.socket, fd: int, before: ProbeResult) -> ProbeResult | None:
    """Probe a TCP connection that the peer had closed at the probe before.

    Nothing comes after a FIN: what had been read to its end still is. And whether the FIN was
    dated by an answer to a keepalive shows only at first.
    """
    try:
        raw = _getsockopt(sock, socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
    except OSError:
        return None
    # Called, `int` is zero.
    left = int if before.unread == 0 else partial(unread, fd)
    result = tcp_result(raw, left, partial(unsent, fd))
    if result.fin_for is None:
        return _probe_tcp(sock, fd)
    return result._replace(is_fin_bound=True) if before.is_fin_bound else result


def probe_snapshot(snapshot: FinalSnapshot) -> ProbeResult:
    """What the snapshot of a dropped socket shows."""
    family = snapshot.family
    if snapshot.type == socket.SOCK_STREAM:
        if family in _TCP_FAMILIES and snapshot.proto in _TCP_PROTOCOLS and snapshot.tcp_info:
            return tcp_result(snapshot.tcp_info, lambda: snapshot.unread, lambda: snapshot.unsent)
        if family in _STREAM_FAMILIES:
            connection = _stream_connection(0, listening=snapshot.listening)
            return _stream_result(family, connection, snapshot.unread, snapshot.unsent)
    return _OTHER


_TCP_FAMILIES = frozenset({socket.AF_INET, socket.AF_INET6})
_OTHER = ProbeResult(State.NONE, Evidence.POLL, Connection.NOT_APPLICABLE)


def _probe_tcp(sock: _socket.socket, fd: int) -> ProbeResult | None:
    try:
        raw = _getsockopt(sock, socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
    except OSError:
        return None
    result = tcp_result(raw, partial(unread, fd), partial(unsent, fd))
    if result.fin_for is not None and _is_kept_alive(sock):
        return bounded_by_keepalive(result, _keepalive_idle(sock))
    if result.connection is Connection.NEVER_CONNECTED and _is_bound(sock):
        # It may listen yet: nothing is wrong with it.
        return result._replace(connection=Connection.NOT_APPLICABLE)
    return result


def _is_kept_alive(sock: _socket.socket) -> bool:
    return bool(ask_or_none(_getsockopt, sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE))


def bounded_by_keepalive(result: ProbeResult, idle: float) -> ProbeResult:
    """The kernel dates a FIN by the last segment, which may be an answer to a keepalive probe.

    Such a probe is sent when nothing has come for the given time, so that an answer to one comes
    at least so long after the last data.
    """
    received, fin = result.last_received_for, result.fin_for
    may_be_answer = received is not None and fin is not None and received - fin >= idle - _TICK
    return result._replace(is_fin_bound=may_be_answer)


# The kernel counts in ticks of up to 10 ms, and two of its times are compared.
_TICK = 0.02


def _keepalive_idle(sock: _socket.socket) -> float:
    try:
        return _getsockopt(sock, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    except OSError:
        return 0.0


def _is_bound(sock: _socket.socket) -> bool:
    address = ask_or_none(_socket.socket.getsockname, sock)
    return bool(address[1] if isinstance(address, tuple) else address)


_Queue = Callable[[], int | None]
# An enumeration takes its time to find a member.
_EVIDENCE = Evidence.TCP_INFO
_BY_NUMBER = tuple((state, CONNECTIONS.get(state, Connection.LIVE)) for state in STATES)
_UNKNOWN = State.NONE, Connection.LIVE
_CLOSE, _CLOSE_WAIT, _LISTEN = map(STATES.index, (State.CLOSE, State.CLOSE_WAIT, State.LISTEN))
_ESTABLISHED, _FIN_WAIT1 = map(STATES.index, (State.ESTABLISHED, State.FIN_WAIT1))


def tcp_result(raw: bytes, unread: _Queue, unsent: _Queue) -> ProbeResult:
    """Read a `struct tcp_info`, of a socket of this process or of another."""
    if len(raw) < TCP_INFO_SIZE:
        raw = raw.ljust(TCP_INFO_SIZE, b"\0")
    number, unacked, sent, received, acknowledged, path_mtu, acked, segments, notsent = (
        _TCP_INFO.unpack_from(raw)
    )
    state, connection = _BY_NUMBER[number] if number < len(STATES) else _UNKNOWN
    if number == _CLOSE and not acked and segments <= 1:
        # Refused at most, by that one segment. Its times count from the machine's start.
        # The kernel learns the path's MTU when it sends a SYN: without one, none was sent.
        tried = Connection.UNCONNECTED if path_mtu else Connection.NEVER_CONNECTED
        return ProbeResult(state, _EVIDENCE, tried)
    if number == _LISTEN:
        return ProbeResult(state, _EVIDENCE, connection)
    return ProbeResult(
        state,
        _EVIDENCE,
        connection,
        acknowledged / 1000 if number == _CLOSE_WAIT else None,
        unread(),
        unsent() if unacked or notsent else 0,
        sent / 1000,
        received / 1000,
    )


# struct tcp_info again: tcpi_retransmits, tcpi_probes and tcpi_backoff at 2 to 4, tcpi_rto at 8.
_ATTEMPTS = struct.Struct("=B x B B B 3x I 12x I 16x I 8x I")
# TCP_RTO_MAX: the kernel waits no longer before it tries again.
_LONGEST_WAIT = 120.0


# getsockopt(SO_MEMINFO), since Linux 4.12: nine numbers, of which the sixth is what is queued to be
# sent or acknowledged. Unlike `ioctl`, getsockopt keeps the GIL: asking thousands would otherwise
# wait for every busy thread, thousands of times.
_SO_MEMINFO, _MEMINFO_SIZE, _NOTHING = 55, 36, bytes(4)


def has_unsent(sock: _socket.socket) -> bool:
    """Whether a socket has sent what is not acknowledged yet, or not sent at all."""
    memory: bytes | None = ask_or_none(
        _getsockopt, sock, socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO_SIZE
    )
    return memory is not None and memory[20:24] != _NOTHING


def unanswered(sock: _socket.socket) -> Unanswered | None:
    """What the peer of a connection does not acknowledge.

    A program that has set TCP_USER_TIMEOUT has decided how long that may last: None.
    """
    found = _unanswered_by(tcp_info_of(sock))
    option = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
    return None if found is None or ask_or_none(_getsockopt, sock, *option) else found


def _unanswered_by(info: bytes) -> Unanswered | None:
    """What a `struct tcp_info` shows of it.

    Nothing while what was sent again may be on its way, nor of a peer that has no room for more but
    says so each time that it is asked.
    """
    if len(info) < _ATTEMPTS.size:
        return None
    state, retransmits, probes, backoff, timeout, unacked, sent, heard = _ATTEMPTS.unpack_from(info)
    wait, sent_for, heard_for = timeout / 1_000_000, sent / 1000, heard / 1000
    # Each wait is twice as long as the one before: what is added up is those that are over.
    if unacked and retransmits and state == _ESTABLISHED and heard > sent:
        seconds, attempts = wait * (1 - 0.5**backoff) + min(sent_for, wait), retransmits
    elif unacked and retransmits and state == _FIN_WAIT1:
        # A FIN is no data: when it was sent last is not dated.
        seconds, attempts = wait * (1 - 0.5**backoff), retransmits
    elif not unacked and probes > 1 and state in (_ESTABLISHED, _FIN_WAIT1):
        last = min(wait * 2**backoff, _LONGEST_WAIT)
        seconds, attempts = last * (1 - 0.5 ** (probes - 1)), probes
    else:
        return None
    return Unanswered(min(seconds, heard_for), attempts, heard_for)


def _probe_stream(sock: _socket.socket, fd: int, family: int, events: int) -> ProbeResult:
    """A stream that keeps no TCP states: the poll events are all there is to know."""
    connection = _stream_connection(events, listening=is_listening(sock))
    if connection is Connection.UNCONNECTED and _is_bound(sock):
        connection = Connection.NOT_APPLICABLE
    return _stream_result(family, connection, unread(fd), unsent(fd))


def _stream_result(
    family: int, connection: Connection, unread: int | None, unsent: int | None
) -> ProbeResult:
    return ProbeResult(
        state=State.UNIX if family == socket.AF_UNIX else State.NONE,
        evidence=Evidence.POLL,
        connection=connection,
        unread=unread,
        unsent=unsent,
    )


def _stream_connection(events: int, *, listening: bool) -> Connection:
    if listening:
        return Connection.NOT_APPLICABLE
    if events & select.POLLERR:
        return Connection.GONE
    if events & select.POLLRDHUP:
        return Connection.PEER_CLOSED
    # Hung up without an end of stream: it never was connected.
    return Connection.UNCONNECTED if events & select.POLLHUP else Connection.LIVE
