"""What a test or fixture that leaked is told: the report, a line of it, and properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from closewait_guard._lines import one_line
from closewait_guard._words import count_of, seconds
from closewait_guard.model import Frame, FrameKind, Leak, Report, SocketRecord
from closewait_guard.pytest_plugin.blocks import blocks
from closewait_guard.pytest_plugin.finding import Finding
from closewait_guard.pytest_plugin.ownership import BORN_IN
from closewait_guard.pytest_plugin.sites import place, sites

__all__ = ["failure_text", "headline", "properties", "trimmed"]

_MOST_PLACES = 3

# Where pytest calls a test, a doctest or a fixture.
_CALLS_OF_PYTEST = frozenset(
    {"pytest_pyfunc_call", "runtest", "call_fixture_func", "_teardown_yield_fixture"}
)


def failure_text(finding: Finding, *, whole_stacks: bool = False) -> str:
    """What the test's error shows: who, how many, and the blocks of the report."""
    report = finding.report
    if report is None:
        return ""
    waited = f", {seconds(finding.waited)} after its end" if finding.waited >= 0.05 else ""
    head = f"{finding.owner} leaked {count_of(len(report.leaks), 'socket')}{waited}"
    shown = report if whole_stacks else trimmed(report)
    return "\n".join([one_line(head), "", *blocks(_unnamed(shown), whole_stacks=whole_stacks)])


def headline(finding: Finding, root: Path) -> str:
    """The one line of it that pytest's short summary has room for."""
    if finding.report is None:
        return ""
    found = sites([finding])
    places = [place(site.frame, root) for site in found[:_MOST_PLACES]]
    if len(found) > _MOST_PLACES:
        places.append(count_of(len(found) - _MOST_PLACES, "more line"))
    who = "" if finding.kind == "test" else f"{finding.owner} "
    leaked = f"leaked {count_of(len(finding.report.leaks), 'socket')}"
    return one_line(f"{who}{leaked}: {', '.join(places)}")


def properties(finding: Finding) -> list[tuple[str, object]]:
    """What the XML file tells of a leaking test: how many, and each verdict with its line."""
    leaks = finding.report.leaks if finding.report is not None else ()
    found: list[tuple[str, object]] = [("socket_leaks", len(leaks))]
    for leak in leaks:
        site = leak.observation.record.site
        place = f" born at {site.filename}:{site.lineno}" if site is not None else ""
        found.append(("socket_leak", one_line(f"{leak.verdict}{place}")))
    return found


def trimmed(report: Report) -> Report:
    """Without the calls of pytest and the like, which every stack of a test ends with."""
    return _each_record(report, _trimmed)


def _unnamed(report: Report) -> Report:
    """Without the owner in every block: the first line names it."""
    return _each_record(report, _without_owner)


def _each_record(report: Report, change: Callable[[SocketRecord], SocketRecord]) -> Report:
    def changed(record: SocketRecord) -> SocketRecord:
        parent = changed(record.parent) if record.parent is not None else None
        return replace(change(record), parent=parent)

    def of_leak(leak: Leak) -> Leak:
        seen = replace(leak.observation, record=changed(leak.observation.record))
        return replace(leak, observation=seen)

    return replace(report, leaks=tuple(of_leak(leak) for leak in report.leaks))


def _trimmed(record: SocketRecord) -> SocketRecord:
    calls = enumerate(record.stack)
    outside = next((place for place, frame in calls if _is_machinery(frame)), 0)
    last = outside
    while last and record.stack[last - 1].kind is not FrameKind.USER:
        last -= 1
    # Tests that were installed with their package look like a library.
    kept = last or outside
    return replace(record, stack=record.stack[:kept]) if kept else record


def _is_machinery(frame: Frame) -> bool:
    name = frame.function.rpartition(".")[2]
    return name in _CALLS_OF_PYTEST and "/_pytest/" in frame.filename.replace("\\", "/")


def _without_owner(record: SocketRecord) -> SocketRecord:
    context = {name: value for name, value in record.context.items() if name != BORN_IN}
    return replace(record, context=context)
