"""Linux: sockets that are in no table of connections: unconnected ones, and other protocols."""

from __future__ import annotations

from functools import cached_property

from closewait_guard._outside import _processes, _procnet
from closewait_guard._outside._process import Process
from closewait_guard._outside._sight import Descriptor
from closewait_guard._probe import Endpoint, View
from closewait_guard.model import Connection, Evidence, State

__all__ = ["Untabled"]

_TCP = {"TCP": "AF_INET", "TCPv6": "AF_INET6", "MPTCP": "AF_INET", "MPTCPv6": "AF_INET6"}
_KINDS = {
    "UDP": ("AF_INET", "SOCK_DGRAM"),
    "UDPv6": ("AF_INET6", "SOCK_DGRAM"),
    "RAW": ("AF_INET", "SOCK_RAW"),
    "RAWv6": ("AF_INET6", "SOCK_RAW"),
    "UNIX": ("AF_UNIX", "SOCK_DGRAM"),
    "UNIX-STREAM": ("AF_UNIX", "SOCK_STREAM"),
}

# Never connected, refused, or reset: the kernel does not tell which, nor since when.
_CLOSED = View(State.CLOSE, Evidence.TABLE, Connection.UNCONNECTED)


class Untabled:
    """What is known of such sockets of one process."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def protocol(self, fd: int, inode: int) -> str | None:
        """The protocol as the kernel names it; None if the descriptor was closed meanwhile."""
        return _processes.protocol_of(self._process.pid, fd, inode)

    def unconnected(self, fd: int, inode: int, protocol: str) -> Descriptor | None:
        """A TCP socket without a connection; None for one of another protocol."""
        family = _TCP.get(protocol)
        if family is None:
            return None
        endpoint = Endpoint(family, "SOCK_STREAM", None, None, inode)
        return Descriptor(fd, endpoint, _CLOSED, accepted=False)

    def described(self, fd: int, inode: int, protocol: str) -> Descriptor:
        """A socket of another protocol, with its addresses as far as there are any."""
        family, kind = _KINDS.get(protocol, (f"AF_{protocol}", "SOCK_RAW"))
        state = State.UNIX if family == "AF_UNIX" else State.NONE
        view = View(state, Evidence.TABLE, Connection.NOT_APPLICABLE)
        local, peer = self._addresses.get(inode, (None, None))
        return Descriptor(fd, Endpoint(family, kind, local, peer, inode), view, accepted=False)

    @cached_property
    def _addresses(self) -> dict[int, tuple[str | None, str | None]]:
        try:
            return _procnet.addresses(self._process.pid)
        except OSError:
            # It has ended meanwhile.
            return {}
