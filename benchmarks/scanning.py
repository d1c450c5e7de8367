"""One scan beside the tools that people use today, and how it grows with the sockets."""

from __future__ import annotations

import os
import resource
import select
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import truediv
from pathlib import Path
from typing import TypeVar

import closewait_guard as cwg
from benchmarks.result import Result

CLOSED = 100
# Fewer than the ephemeral ports that lie between one address and another.
_OF_ONE_ADDRESS = 10_000
SPARE = 500
_SCANS_A_ROUND = 5
# Of all processes, and of connections that no process has any more: what psutil reads.
_ROWS = "rows of the system's tables"
# Reads only the kernel's table: it names no process, and so is no measure for a scan.
_WITHOUT_PROCESSES = "ss -tn state close-wait"

_Seen = TypeVar("_Seen")

# Accepts on as many loopback addresses as it takes, closes the first of them, and waits.
_PEER = f"""
import resource, socket, sys
count = int(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
servers = [socket.create_server((f"127.0.1.{{number + 1}}", 0), backlog=4096)
           for number in range(1 + (count - 1) // {_OF_ONE_ADDRESS})]
print(*(server.getsockname()[1] for server in servers), flush=True)
accepted = [servers[number // {_OF_ONE_ADDRESS}].accept()[0] for number in range(count)]
for sock in accepted[:int(sys.argv[2])]:
    sock.close()
print("ready", flush=True)
sys.stdin.read()
"""


def run(*, quick: bool) -> list[Result]:
    if quick:
        return list(looks((100, 300), census_at=300))
    return list(looks(reachable((100, 1000, 10_000, 100_000)), census_at=10_000))


def looks(
    sizes: tuple[int, ...],
    *,
    census_at: int | None = None,
    rounds: int = 9,
    bound: float | None = None,
) -> Iterator[Result]:
    """A scan, the kernel's part in it, and what others take, at each size.

    The ratio of a scan is its time for each socket, to that of the first size.

    Args:
        sizes: How many sockets.
        census_at: The size at which a listing of all descriptors is measured too.
        rounds: How often the others look.
        bound: The most that the ratio of a scan is meant to be.
    """
    first: float | None = None
    for size in sizes:
        with connected(size) as socks:
            took, polled = times_of(socks)
            first = first or took / size
            name = f"scan of {size:,} sockets, {CLOSED} in CLOSE_WAIT"
            yield Result(name, took, "ms", took / size / first, bound, size)
            yield Result(f"poll() alone, {size:,} sockets", polled, "ms", size=size)
            yield from _beside_others(size, rounds)
            yield Result(f"{_ROWS}, {size:,} sockets", _rows_of_the_system(), "rows", size=size)
            if size == census_at:
                yield _with_census(size, took)


def _rows_of_the_system() -> int:
    tables = [Path("/proc/net", name) for name in ("tcp", "tcp6")]
    return sum(table.read_bytes().count(b"\n") - 1 for table in tables if table.exists())


def reachable(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Rising sizes as far as the hard limit on descriptors lets a process go."""
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE
    return sizes if sizes[-1] <= room else (*(size for size in sizes if size < room), room)


@contextmanager
def connected(count: int, closed: int = CLOSED) -> Iterator[list[socket.socket]]:
    """So many open connections, the peer in a process of its own, under an installed guard."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with subprocess.Popen(
        [sys.executable, "-c", _PEER, str(count), str(closed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        ports = [int(port) for port in peer.stdout.readline().split()]
        cwg.install(grace=0)
        socks = [
            socket.create_connection((f"127.0.1.{place + 1}", ports[place]))
            for place in (number // _OF_ONE_ADDRESS for number in range(count))
        ]
        assert peer.stdout.readline() == "ready\n"
        try:
            yield socks
        finally:
            cwg.uninstall()
            for sock in socks:
                sock.close()
            peer.stdin.close()


def times_of(socks: list[socket.socket], rounds: int = 20) -> tuple[float, float]:
    """The medians of a scan, and of the kernel's part in it: one poll(). In milliseconds.

    Every scan must find what there is to find.
    """
    poll = select.poll()
    for sock in socks:
        poll.register(sock, select.POLLRDHUP)
    scans, polls = [], []
    for _ in range(rounds):
        took, report = _timed(cwg.scan)
        scans.append(took)
        assert len(report.leaks) == CLOSED, len(report.leaks)
        polls.append(_timed(lambda: poll.poll(0))[0])
    return statistics.median(scans), statistics.median(polls)


def _with_census(size: int, took: float) -> Result:
    """The same look with a listing of the process's descriptors, which finds native sockets."""
    guard = cwg.install()
    times = []
    for _ in range(15):
        listed, _ = _timed(guard.mark)  # It lists them.
        times.append(listed + _timed(cwg.scan)[0])
    both = statistics.median(times)
    return Result(
        f"scan of {size:,} sockets that lists all descriptors", both, "ms", both / took, size=size
    )


def _beside_others(size: int, rounds: int) -> list[Result]:
    pid = str(os.getpid())
    lsof = ["lsof", "-nP", "-a", "-p", pid, "-iTCP", "-sTCP:CLOSE_WAIT"]
    others: dict[str, Callable[[], object]] = {}
    if shutil.which("lsof"):
        others["lsof -nP -a -p PID -iTCP -sTCP:CLOSE_WAIT"] = lambda: _run(lsof)
    if shutil.which("ss"):
        others["ss -tnp state close-wait"] = lambda: _run(["ss", "-tnp", "state", "close-wait"])
        others[_WITHOUT_PROCESSES] = lambda: _run(_WITHOUT_PROCESSES.split())
    try:
        import psutil
    except ImportError:
        pass
    else:
        others["psutil net_connections"] = lambda: psutil.Process().net_connections("tcp")
    return [_against(name, look, size, rounds) for name, look in others.items()]


def _against(name: str, look: Callable[[], object], size: int, rounds: int) -> Result:
    # Each beside scans of its own round: what else the machine does comes and goes.
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(statistics.median(_timed(cwg.scan)[0] for _ in range(_SCANS_A_ROUND)))
        theirs.append(_timed(look)[0])
    # The ratio is ours to theirs: a fiftieth is the most it is meant to be.
    ratio = statistics.median(map(truediv, ours, theirs))
    bound = 1 / 50 if size == 10_000 and name != _WITHOUT_PROCESSES else None
    took = statistics.median(theirs)
    return Result(f"{name}, {size:,} sockets; ours to it", took, "ms", ratio, bound, size)


def _timed(look: Callable[[], _Seen]) -> tuple[float, _Seen]:
    """How many milliseconds a look takes, and what it sees."""
    started = time.perf_counter()
    seen = look()
    return (time.perf_counter() - started) * 1e3, seen


def _run(command: list[str]) -> None:
    # lsof answers 1 where it has found nothing of a kind that was asked for.
    subprocess.run(command, capture_output=True, check=False)
