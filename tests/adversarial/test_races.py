"""Threads that open, close, drop and scan sockets all at once: no finding is wrong.

`World` is that program; each of its activities goes on in threads of its own until the time is up.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import sys
import threading
import time
from collections import Counter, deque

import pytest

import closewait_guard as cwg
from closewait_guard.model import Origin, Verdict

# What is dropped while it is open is what this is about.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

GRACE = 0.05
LEAKS = 20
MOST_CYCLES = 10


class Cycle:
    """Collected together with its socket; others get their turn in the midst of the collection."""

    uncollected = 0

    def __init__(self, scan):
        self.myself = self
        self.sock = socket.socket()
        self.scan = scan
        Cycle.uncollected += 1

    def __del__(self):
        self.scan()
        time.sleep(0.0005)
        Cycle.uncollected -= 1


class World:
    """Sockets that are opened, closed, dropped and leaked, and what scans say of them."""

    def __init__(self, guard, server):
        self.guard = guard
        self.address = server.getsockname()
        self.server = server
        self.over = threading.Event()
        self.wrong = Counter()
        self.scans = 0
        self.drops = []
        self.raised = []
        self.leaked = [self.half_closed() for _ in range(LEAKS)]
        newest = guard.mark()
        # Those are the first, and stay open.
        time.sleep(GRACE + 0.05)
        found = [leak.observation.record.serial for leak in guard.scan().findings]
        self.serials = {serial for serial in found if serial < newest}
        assert len(self.serials) == LEAKS

    def half_closed(self):
        """A connection of which each end has sent something, and the peer has closed its own."""
        ours = socket.create_connection(self.address)
        theirs, _ = self.server.accept()
        with theirs:
            ours.sendall(b"question")
            theirs.recv(100)
            theirs.sendall(b"answer")
        return ours

    # What goes on.

    def close(self):
        """Close what the peers have closed some time ago."""
        waiting = deque()
        while not self.over.is_set():
            with contextlib.suppress(BlockingIOError):
                waiting.append((time.monotonic(), self.half_closed()))
            while waiting and waiting[0][0] < time.monotonic() - 2 * GRACE:
                waiting.popleft()[1].close()
        for _, sock in waiting:
            sock.close()

    def reuse(self):
        """Open and close, so that numbers come back at once."""
        while not self.over.is_set():
            with socket.socket(), socket.socket() as second, second.dup():
                pass

    def accept(self):
        """Accept what the peer has closed while it waited, and what was in the backlog for long."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            while not self.over.is_set():
                for _ in range(5):
                    socket.create_connection(server.getsockname()).close()
                time.sleep(2 * GRACE)
                for _ in range(5):
                    server.accept()[0].close()

    def drop(self):
        """Let go of sockets that are open still, in cycles and without."""
        while not self.over.is_set():
            if Cycle.uncollected < MOST_CYCLES:
                Cycle(self.guard.scan)
                Cycle(lambda: None)
                self.drops.extend([1, 1])
            gc.collect()
            socket.socket()
            self.drops.append(1)
            time.sleep(0.01)

    def spin(self):
        """Keep the interpreter to itself."""
        while not self.over.is_set():
            sum(range(1000))

    def scan(self):
        while not self.over.is_set():
            self.judge(self.guard.scan(full=True))
            self.judge(self.guard.report())

    def judge(self, report):
        self.scans += 1
        reported = {leak.observation.record.serial: leak for leak in report.findings}
        for leak in report.findings:
            origin = leak.observation.record.origin
            self.wrong["closed_elsewhere"] += leak.verdict is Verdict.CLOSED_ELSEWHERE
            self.wrong["native"] += leak.is_leak and origin is Origin.NATIVE
            self.wrong["creation lost"] += (
                leak.verdict is Verdict.DROPPED and origin is Origin.ADOPTED
            )
        for serial in self.serials:
            verdict = reported[serial].verdict if serial in reported else None
            self.wrong[f"leak reported as {verdict}"] += verdict is not Verdict.LEAKED

    def run(self, activities, seconds):
        def keep_on(activity):
            try:
                activity()
            except BaseException as error:
                self.raised.append(error)
                self.over.set()

        self.over.clear()
        threads = [threading.Thread(target=keep_on, args=(each,)) for each in activities]
        for thread in threads:
            thread.start()
        self.over.wait(seconds)
        self.over.set()
        for thread in threads:
            thread.join()
        gc.collect()


@pytest.fixture
def world():
    before = sys.getswitchinterval()
    with (
        socket.create_server(("127.0.0.1", 0), backlog=100) as server,
        cwg.Guard(cwg.Settings(grace=GRACE, dropped_kept=50), [lambda report: None]) as guard,
    ):
        world = World(guard, server)
        sys.setswitchinterval(1e-6)
        try:
            yield world
        finally:
            sys.setswitchinterval(before)
            for sock in world.leaked:
                sock.close()


def check(world, seconds):
    scan, close, drop = [world.scan] * 3, [world.close] * 2, [world.drop] * 2
    others = [world.reuse, world.reuse, world.accept, world.spin]
    # A busy machine needs longer for as many scans.
    for _ in range(5):
        world.run([*scan, *close, *drop, *others], seconds)
        if world.scans > 10:
            break
    print("\n", world.scans, "scans,", len(world.drops), "dropped,", dict(+world.wrong))
    assert not world.raised
    assert world.scans > 10
    assert not +world.wrong
    assert world.guard.scan().coverage.dropped == len(world.drops)


def test_no_socket_is_a_leak_wrongly_while_all_goes_on_at_once(world):
    check(world, 2)


@pytest.mark.long
def test_no_socket_is_a_leak_wrongly_while_all_goes_on_at_once_for_long(world, attack_seconds):
    check(world, attack_seconds)
