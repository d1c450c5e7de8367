"""Check the recorder in C for what its tests cannot see: errors of memory, and lost references.

python scripts/check_speedups.py sanitize [TESTS]   tests under the sanitizers of gcc
python3-dbg scripts/check_speedups.py references    350,000 sockets under a debug build of Python

The first builds the extension of this tree by itself. The second takes the installed one: a debug
build of Python counts all references (`sys.gettotalrefcount`), and needs its own build of it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import closewait_guard as cwg
from closewait_guard._capture import why_no_speedups

try:
    import _testcapi  # type: ignore[import-not-found]
except ImportError:
    _testcapi = None

ROOT = Path(__file__).parents[1]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
# The second opens and drops sockets in eight threads.
STRESS = "test_threads_that_open_drop_and_close_lose_no_record_and_cause_no_false_leak"
# Without those that talk to databases: their libraries would be under the sanitizers too.
TESTS = (
    *(
        f"tests/capture/test_{name}.py"
        for name in (
            "awaiting",
            "dropped",
            "installing",
            "patches_of_others",
            "records",
            "speedups",
        )
    ),
    "tests/capture/test_owners.py",
    f"tests/test_harmless.py::{STRESS}",
)
# Of each kind.
SOCKETS = 50_000
UNMEASURED = 2_000
# Of all sockets together: what is made once. A single reference lost in 256 sockets is more.
MOST_REFERENCES = 150


def sanitize(tests: list[str]) -> int:
    """Run tests with an extension that ends the process at the first error of memory."""
    with tempfile.TemporaryDirectory() as directory:
        # In a directory of its own, which stands before the package that is installed.
        package = f"{directory}/package"
        built = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            package,
            ".",
        ]
        flags = f"{SANITIZERS} -O1 -g -fno-omit-frame-pointer"
        environment = {
            "CFLAGS": flags,
            "LDFLAGS": SANITIZERS,
            "CLOSEWAIT_GUARD_SPEEDUPS": "1",
        }
        subprocess.run(built, cwd=ROOT, env=os.environ | environment, check=True)
        # A child of a test may end, and the test pass: what it had to say is in a file.
        log = f"log_path={directory}/error"
        environment = {
            "PYTHONPATH": package,
            "PYTHONMALLOC": "malloc",
            "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libstdc++.so"))),
            # The interpreter frees little of what it has when it ends.
            "ASAN_OPTIONS": f"detect_leaks=0:{log}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:{log}",
        }
        run = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(run, cwd=ROOT, env=os.environ | environment, check=False)
        errors = sorted(Path(directory).glob("error*"))
        for error in errors:
            print(error.read_text(encoding="utf-8", errors="replace"))
        return 1 if errors else done.returncode


def library(name: str) -> str:
    """The path of a library of the compiler's."""
    compiler = shutil.which("gcc") or sys.exit("gcc is needed")
    found = subprocess.check_output([compiler, f"-print-file-name={name}"], text=True)
    return str(Path(found.strip()).resolve())


def references() -> int:
    """Open and close sockets in each way, and compare the counts of references."""
    total: Callable[[], int] | None = getattr(sys, "gettotalrefcount", None)
    if total is None:
        sys.exit("this Python counts no references: apt-get install python3-dbg")
    reason = why_no_speedups()
    if reason is not None:
        sys.exit(f"this Python has no extension: {reason}")
    failed = 0
    for open_and_close in WAYS if _testcapi else WAYS[:-1]:
        with guarded():
            repeat(open_and_close, UNMEASURED)
            before = total()
            repeat(open_and_close, SOCKETS)
            more = total() - before
        failed += more > MOST_REFERENCES
        print(f"{more:+} references after {SOCKETS:,} sockets, {open_and_close.__name__}")
    return min(failed, 1)


@contextmanager
def guarded() -> Iterator[None]:
    """A guard that records all it can, which opens no socket by itself."""
    settings = cwg.Settings(context=lambda: {"request": 1}, speedups=True)
    with cwg.Guard(settings), cwg.label("references"):
        yield


def repeat(open_and_close: Callable[[int], None], count: int) -> None:
    """And leave no garbage."""
    open_and_close(count)
    gc.collect()


def plain(count: int) -> None:
    """From the main thread."""
    for _ in range(count):
        socket.socket().close()


def kept_open(count: int) -> None:
    """Many at a time: their stacks are shared."""
    for _ in range(count // 500):
        for sock in [socket.socket() for _ in range(500)]:
            sock.close()


def of_descriptors(count: int) -> None:
    """With a parent each, except for the first of four."""
    for _ in range(count // 4):
        first = socket.socket()
        second = first.dup()
        third = socket.socket(fileno=second.detach())
        fourth = socket.fromfd(third.fileno(), third.family, third.type)
        for sock in (first, third, fourth):
            sock.close()


def accepted(count: int) -> None:
    """By a listener, and the connections to it."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        for _ in range(count // 2):
            with socket.create_connection(listener.getsockname()), listener.accept()[0]:
                pass


def in_tasks(count: int) -> None:
    """Of an event loop."""

    async def task() -> None:
        plain(100)

    async def main() -> None:
        for _ in range(count // 100):
            await asyncio.create_task(task())

    asyncio.run(main())


def in_threads(count: int) -> None:
    """One after the other."""
    for _ in range(count // 100):
        thread = threading.Thread(target=plain, args=(100,))
        thread.start()
        thread.join()


def without_memory(count: int) -> None:
    """One allocation fails, another each time, in the program's own call or in what records it.

    Of plain sockets: a debug build of 3.14 aborts where a list of Python code finds no memory,
    which looking into the caller's variables needs.
    """
    fails = range(100)
    for number in [*fails] * (count // len(fails)):
        _testcapi.set_nomemory(number, number + 1)
        try:
            sock = socket.socket()
        except MemoryError:
            continue
        finally:
            _testcapi.remove_mem_hooks()
        sock.close()


WAYS = (plain, kept_open, of_descriptors, accepted, in_tasks, in_threads, without_memory)


def main() -> int:
    """Do what the command line says."""
    match sys.argv[1:]:
        case ["sanitize", *tests]:
            return sanitize(tests or list(TESTS))
        case ["references"]:
            return references()
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
