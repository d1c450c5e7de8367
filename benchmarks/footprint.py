"""What a live tracked socket takes in memory beyond the socket itself, at stack depth 20."""

from __future__ import annotations

import gc
import socket
import tracemalloc

import closewait_guard as cwg
from benchmarks.result import Result


def run(*, quick: bool) -> list[Result]:
    many = 300 if quick else 5000
    found = []
    for name, sites in (("one site", 1), ("100 sites", 100)):
        bare = _bytes_each(many, sites)
        cwg.install(stack_depth=20)
        try:
            guarded = _bytes_each(many, sites)
        finally:
            cwg.uninstall()
        found.append(
            Result(f"memory of a live socket, beyond it, {name}", guarded - bare, "B", bound=1000)
        )
    return found


def _bytes_each(many: int, sites: int) -> float:
    """Through `sites` different functions, so that not all sockets have the same stack."""
    makers = [_maker(number) for number in range(sites)]
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    socks = [makers[number % sites](20) for number in range(many)]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for sock in socks:
        sock.close()
    return (after - before) / many


def _maker(number: int):  # type: ignore[no-untyped-def]
    """A function of its own, with calls at offsets of its own."""
    lines = "\n".join(["    pass" if line else "    x = 1" for line in range(number % 7)])
    padding = "\n".join("    depth = depth + 0" for _ in range(number))
    source = (
        f"def make_{number}(depth):\n{lines or '    pass'}\n{padding}\n"
        f"    return make_{number}(depth - 1) if depth > 0 else socket.socket()\n"
    )
    space = {"socket": socket}
    exec(source, space)
    return space[f"make_{number}"]
