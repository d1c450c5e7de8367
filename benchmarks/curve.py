"""How a scan grows up to 100,000 sockets, and what others take for as many.

Where the hard limit on descriptors lies below that and may not be raised, it is measured in a
kernel of our own: User-Mode Linux (Debian: user-mode-linux) is a program like any other. System
calls are slow in it, so that only growth and ratios mean something, not times.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.result import Result
from benchmarks.scanning import SPARE, looks, reachable

_SIZES = (100, 1000, 10_000, 30_000, 100_000)
_ROOT = Path(__file__).resolve().parent.parent
_KERNEL = "linux.uml"
_MARK = "curve: "
_MOST_SECONDS = 600
# It sees the files of this machine, and may change none of them.
_OPTIONS = "mem=8G root=/dev/root rootfstype=hostfs rootflags=/ ro quiet con=null con0=fd:0,fd:1"
_INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
ip link set lo up
ulimit -n {descriptors}
cd {root}
export PATH={path}
PYTHONPATH={modules} PYTHONDONTWRITEBYTECODE=1 {python} -m benchmarks.curve
echo "{mark}the end"
echo o > /proc/sysrq-trigger
sleep 10
"""


def run(*, quick: bool) -> list[Result]:
    wanted = (100, 300) if quick else _SIZES
    sizes = reachable(wanted)
    if sizes != wanted and shutil.which(_KERNEL):
        return _measured_in_a_kernel_of_our_own()
    if sizes != wanted:
        print(f"no {_KERNEL} here: the curve ends at {sizes[-1]:,} sockets")
    return list(_measured(sizes))


def _measured(sizes: tuple[int, ...]) -> Iterator[Result]:
    # The others take minutes for as many.
    return looks(sizes, rounds=1, bound=1)


def _measured_in_a_kernel_of_our_own() -> list[Result]:
    init = _INIT.format(
        descriptors=_SIZES[-1] + SPARE,
        root=shlex.quote(str(_ROOT)),
        path=shlex.quote(os.environ["PATH"]),
        modules=shlex.quote(os.pathsep.join(sys.path)),
        python=shlex.quote(sys.executable),
        mark=_MARK,
    )
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "init"
        script.write_text(init, encoding="utf-8")
        script.chmod(0o755)
        booted = subprocess.run(
            [_KERNEL, *_OPTIONS.split(), f"init={script}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_MOST_SECONDS,
            check=False,
        )
    *lines, end = [line for line in booted.stdout.splitlines() if line.startswith(_MARK)] or [""]
    found = [Result(*json.loads(line.removeprefix(_MARK))) for line in lines]
    if not end or not found or found[-1].size != _SIZES[-1]:
        raise RuntimeError(f"{_KERNEL} did not come to an end:\n{booted.stdout[-2000:]}")
    return found


if __name__ == "__main__":
    for measured in _measured(_SIZES):
        print(_MARK + json.dumps(measured), flush=True)
