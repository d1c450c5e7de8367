"""Linux: the tables of sockets as text, which every process may read for its namespace.

That of TCP dates nothing, and costs the kernel more than netlink; it is what remains where the
namespace of another process may not be entered, or the kernel answers no diagnostics.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TextIO

from closewait_guard._outside._entry import Entry

__all__ = ["addresses", "table"]


def table(pid: int | str) -> Iterator[Entry]:
    """Every TCP connection of the network that a process lives in."""
    for family, line in _lines(pid, {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6}):
        # What is no line of a table is passed over, so that it hides no other.
        with suppress(ValueError, IndexError, struct.error):
            yield _entry(family, line.split())


def _entry(family: int, words: list[str]) -> Entry:
    local_host, local_port = _address(words[1], family)
    peer_host, peer_port = _address(words[2], family)
    sent, received = (int(queue, 16) for queue in words[4].split(":"))
    return Entry(
        family,
        int(words[3], 16),
        local_port,
        peer_port,
        local_host,
        peer_host,
        received,
        sent,
        int(words[7]),
        int(words[9]),
    )


def _address(text: str, family: int) -> tuple[bytes, bytes]:
    """Words of 32 bits in the machine's own order; the port as a number."""
    host, port = text.split(":")
    if (len(host), len(port)) != (32 if family == socket.AF_INET6 else 8, 4):
        raise ValueError(text)
    words = (host[start : start + 8] for start in range(0, len(host), 8))
    return b"".join(struct.pack("=I", int(word, 16)) for word in words), bytes.fromhex(port)


def addresses(pid: int) -> dict[int, tuple[str | None, str | None]]:
    """Of UDP and UNIX sockets in a process's network, by inode: this end and the other."""
    found: dict[int, tuple[str | None, str | None]] = {}
    for family, line in _lines(pid, {"udp": socket.AF_INET, "udp6": socket.AF_INET6}):
        with suppress(ValueError, IndexError, struct.error):
            entry = _entry(family, line.split())
            connected = entry.peer if any(entry.peer_port) else None
            found[entry.inode] = entry.local, connected
    return found | _unix_addresses(pid)


# Number, references, protocol, flags, type, state, inode, and the path if it has one.
_UNIX = re.compile(r"[0-9a-fA-F]+: (?:[0-9A-F]+ ){5} *([0-9]{1,20})(?: (.*))?\n?")


def _unix_addresses(pid: int) -> dict[int, tuple[str | None, str | None]]:
    """A path may hold the end of a line, and what looks like another: then neither is believed."""
    found: dict[int, tuple[str | None, str | None]] = {}
    for _, line in _lines(pid, {"unix": socket.AF_UNIX}):
        match = _UNIX.fullmatch(line)
        if match is not None:
            inode = int(match[1])
            found[inode] = (None if inode in found else match[2]), None
    return found


def _lines(pid: int | str, files: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    for name, family in files.items():
        # There need not be IPv6. Where the others are missing, the process has ended.
        absent = suppress(FileNotFoundError) if name.endswith("6") else nullcontext()
        with absent, _opened(pid, name) as lines:
            next(lines, None)
            for line in lines:
                yield family, line


def _opened(pid: int | str, name: str) -> TextIO:
    path = Path(f"/proc/{pid}/net/{name}")
    return path.open(encoding="utf-8", errors="backslashreplace", newline="\n")
