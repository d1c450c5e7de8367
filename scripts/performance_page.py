"""Fill the tables of docs/performance.md, and draw its pictures, from what was measured.

python -m benchmarks --json docs/performance.json
python -m benchmarks plugin --json docs/performance_plugin.json
python -m benchmarks curve --json docs/performance_curve.json
python scripts/performance_page.py
python scripts/performance_page.py --check  # 1 if the tables are not those of the figures
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, FIGURES, PICTURES = DOCS / "performance.md", DOCS / "performance.json", DOCS / "pictures"
# Measured apart: these take minutes.
APART = (DOCS / "performance_plugin.json", DOCS / "performance_curve.json")

_CENSUS = "that lists all descriptors"
_ROWS = "rows of the system's tables"

Rows = list[dict[str, Any]]


def main() -> int:
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    for apart in APART:
        figures["results"] |= json.loads(apart.read_text(encoding="utf-8"))["results"]
    text = PAGE.read_text(encoding="utf-8")
    renewed = _filled(text, figures)
    if "--check" in sys.argv[1:]:
        return int(text != renewed)
    PAGE.write_text(renewed, encoding="utf-8")
    _draw(figures["results"])
    return 0


def _filled(text: str, figures: Mapping[str, Any]) -> str:
    for name, lines in _PARTS.items():
        table = "\n".join(lines(figures))
        block = f"<!-- {name} -->\n{table}\n<!-- end of {name} -->"
        pattern = f"<!-- {name} -->.*<!-- end of {name} -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def _machine(figures: Mapping[str, Any]) -> Iterator[str]:
    virtual = " in a virtual machine" if figures["virtual"] else ""
    yield (
        f"Measured on {figures['measured_on']} with {figures['python']} on {figures['system']}, "
        f"{figures['cores']} cores of {figures['processor']}{virtual} (load {figures['load']} at "
        f"the end), at most {figures['descriptor_limit']:,} descriptors for a "
        "process. Yours will differ; the ratios less so."
    )


def _ratios(benchmark: str) -> Callable[[Mapping[str, Any]], Iterator[str]]:
    """A table of figures beside the first of their kind."""

    def lines(figures: Mapping[str, Any]) -> Iterator[str]:
        yield from _head("", "time", "ratio", "meant to be")
        for row in figures["results"][benchmark]:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            yield _row(row["name"], _figure(row), ratio, _bound(row))

    return lines


def _http(figures: Mapping[str, Any]) -> Iterator[str]:
    yield from _head(
        "server, client", "guard in", "requests", "faster half", "CPU time of both", "p99"
    )
    rows = iter(figures["results"]["http_workload"])
    for rate, half, cpu, p99 in zip(rows, rows, rows, rows, strict=True):
        programs, variant = _http_names(rate)
        yield _row(
            programs,
            variant,
            f"{rate['figure']:,.0f}/s" + _also(1 / rate["ratio"], variant),
            f"{half['figure']:.2f} ms" + _also(half["ratio"], variant),
            f"{cpu['figure']:.0f} µs" + _also(cpu["ratio"], variant),
            f"{p99['figure']:.1f} ms" + _also(p99["ratio"], variant),
        )


def _also(ratio: float, variant: str) -> str:
    return "" if variant == "none" else f" ({_percent(ratio)})"


def _http_names(row: Mapping[str, Any]) -> tuple[str, str]:
    programs, _, variant = row["name"].removeprefix("requests: ").rpartition(", ")
    place = variant.partition(";")[0].removeprefix("guard in ").removeprefix("the ")
    return programs, place.replace("bare", "none")


def _scan_times(benchmark: str) -> Callable[[Mapping[str, Any]], Iterator[str]]:
    """A table of what a scan takes, by the number of sockets."""

    def lines(figures: Mapping[str, Any]) -> Iterator[str]:
        by_tool = _by_tool(figures["results"][benchmark])
        rows = by_tool.pop(_ROWS, None)
        yield from _head("sockets", *(f"`{tool}`" for tool in by_tool), *([_ROWS] if rows else []))
        for size in sorted(by_tool["scan()"]):
            times = (f"{times[size]:,.1f} ms" for times in by_tool.values())
            yield _row(f"{size:,}", *times, *([f"{rows[size]:,.0f}"] if rows else []))

    return lines


def _by_tool(rows: Rows) -> dict[str, dict[int, float]]:
    """Milliseconds by tool and number of sockets; and the rows of the system's tables."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if _CENSUS in row["name"]:
            continue
        tool = "scan()" if row["name"].startswith("scan") else row["name"].partition(", ")[0]
        found.setdefault(tool, {})[row["size"]] = row["figure"]
    return found


def _frameworks(figures: Mapping[str, Any]) -> Iterator[str]:
    yield from _head("", "CPU time of a request, bare", "with label and monitor", "meant to be")
    for row in figures["results"]["frameworks"]:
        name = row["name"].removeprefix("CPU of a request: ").removesuffix(", label and monitor")
        bound = f"at most {_percent(row['bound'])}"
        yield _row(name, _figure(row), _percent(row["ratio"]), bound)


def _owners(figures: Mapping[str, Any]) -> Iterator[str]:
    yield from _head("", "measured", "meant to be at most")
    for row in figures["results"]["owners"]:
        yield _row(row["name"], _figure(row), _bound_of_figure(row))


def _rest(figures: Mapping[str, Any]) -> Iterator[str]:
    yield from _head("", "measured", "meant to be at most")
    results = figures["results"]
    census = [row for row in results["scanning"] if _CENSUS in row["name"]]
    monitors = (*results["monitoring"], *results.get("stops", ()))
    for row in (*results["footprint"], *results["importing"], *monitors, *census):
        yield _row(row["name"], _figure(row), _bound_of_figure(row))


def _bound_of_figure(row: Mapping[str, Any]) -> str:
    if row["bound"] is None:
        return ""
    unit = row["unit"].replace("us", "µs")
    return f"{row['bound'] * (100 if unit == '%' else 1):g} {unit}"


_PARTS: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "machine": _machine,
    "opening and closing": _ratios("hot_path"),
    "http": _http,
    "owners": _owners,
    "frameworks": _frameworks,
    "scans": _scan_times("scanning"),
    "curve": _scan_times("curve"),
    "memory": _rest,
    "command line": _ratios("command_line"),
    "plugin": _ratios("plugin"),
}


def _head(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield "|" + "---|" * len(cells)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(row: Mapping[str, Any]) -> str:
    places = 2 if row["figure"] < 10 else 1
    return f"{row['figure']:,.{places}f} {row['unit']}".replace(" us", " µs")


def _bound(row: Mapping[str, Any]) -> str:
    return "" if row["bound"] is None else f"at most {row['bound']:g}"


def _percent(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.1f} %"


def _draw(results: Mapping[str, Rows]) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.use("svg")
    plt.rcParams.update({"svg.hashsalt": "closewait_guard", "svg.fonttype": "none"})
    for name, draw in (("opening", _draw_opening), ("scans", _draw_scans), ("http", _draw_http)):
        figure, axes = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
        draw(axes, results)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


def _draw_opening(axes: Any, results: Mapping[str, Rows]) -> None:
    rows = results["hot_path"][::-1]
    colours = ["#3572a5" if "guard" in row["name"] else "#a0a8b0" for row in rows]
    bars = axes.barh([row["name"] for row in rows], [row["figure"] for row in rows], color=colours)
    axes.bar_label(bars, [f" {row['ratio']:.2f} x" for row in rows])
    axes.set_xlabel("µs")


def _draw_scans(axes: Any, results: Mapping[str, Rows]) -> None:
    by_tool = _by_tool(results["scanning"])
    by_tool.pop(_ROWS, None)
    for tool, times in by_tool.items():
        width = 2.5 if tool == "scan()" else 1.2
        axes.loglog(list(times), list(times.values()), marker="o", label=tool, linewidth=width)
    axes.set_xlabel("sockets, 100 of them in CLOSE_WAIT")
    axes.set_ylabel("ms")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")


def _draw_http(axes: Any, results: Mapping[str, Rows]) -> None:
    rows = results["http_workload"][::4][::-1]
    names = ["{}: {}".format(*_http_names(row)) for row in rows]
    colours = ["#a0a8b0" if name.endswith("none") else "#3572a5" for name in names]
    bars = axes.barh(names, [row["figure"] for row in rows], color=colours)
    axes.bar_label(bars, [f" {1 / row['ratio']:.1%}" for row in rows])
    axes.set_xlabel("requests a second")


if __name__ == "__main__":
    sys.exit(main())
