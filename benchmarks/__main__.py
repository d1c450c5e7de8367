"""Run every benchmark, print a table, write JSON.

python -m benchmarks                 # all of it, some minutes
python -m benchmarks --quick         # small sizes: shows that they run, judges nothing
python -m benchmarks --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

from benchmarks import command_line, footprint, hot_path, importing, monitoring, plugin, scanning
from benchmarks.result import Result, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/latest.json"))
    arguments = parser.parse_args()
    results: list[Result] = []
    for benchmark in (importing, footprint, hot_path, scanning, monitoring, command_line, plugin):
        found = benchmark.run(quick=arguments.quick)
        print(table(found), flush=True)
        results += found
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(_document(results), indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.json}")


def _document(results: list[Result]) -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "results": [result._asdict() for result in results],
    }


if __name__ == "__main__":
    main()
