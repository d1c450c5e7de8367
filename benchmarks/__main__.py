"""Run every benchmark, print a table, write JSON.

python -m benchmarks                 # all of it but curve and plugin, four minutes
python -m benchmarks plugin          # whole suites, some minutes
python -m benchmarks curve           # scans of up to 100,000 sockets, some minutes
python -m benchmarks --quick         # small sizes: shows that they run, judges nothing
python -m benchmarks --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path

from benchmarks import (
    command_line,
    curve,
    footprint,
    frameworks,
    hot_path,
    http_workload,
    importing,
    monitoring,
    owners,
    plugin,
    scanning,
    stops,
)
from benchmarks.result import Result, table

_BENCHMARKS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        importing,
        footprint,
        hot_path,
        owners,
        # Before what leaves thousands of connections in TIME_WAIT: psutil reads those too.
        scanning,
        http_workload,
        frameworks,
        monitoring,
        stops,
        command_line,
        plugin,
        curve,
    )
}
# Whole runs of whole suites take minutes, and so does the opening of 100,000 sockets.
_BY_NAME_ONLY = {"plugin", "curve"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(_BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/latest.json"))
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {*_BENCHMARKS}:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    results: dict[str, list[Result]] = {}
    usual = [name for name in _BENCHMARKS if arguments.quick or name not in _BY_NAME_ONLY]
    for name in arguments.names or usual:
        results[name] = _BENCHMARKS[name].run(quick=arguments.quick)
        print(table(results[name]), flush=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(_document(results), indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.json}")


def _document(results: dict[str, list[Result]]) -> dict[str, object]:
    return {
        "measured_on": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "processor": _cpuinfo("model name") or platform.machine(),
        "virtual": "hypervisor" in _cpuinfo("flags").split(),
        "cores": os.cpu_count(),
        "descriptor_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "load": round(os.getloadavg()[0], 1),
        "results": {name: [each._asdict() for each in found] for name, found in results.items()},
    }


def _cpuinfo(name: str) -> str:
    """What Linux says of the first processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


if __name__ == "__main__":
    main()
