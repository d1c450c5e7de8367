"""Never run, only type-checked: what users write must pass a strict checker."""

from __future__ import annotations

import closewait_guard as cwg
from closewait_guard.testing import CapturingReporter


def reporter(report: cwg.Report) -> None:
    for group in report.by_site():
        site: cwg.Frame | None = group.site
        print(group.verdict.is_leak, site.lineno if site else "", len(group.findings))


class Counting:
    def __call__(self, report: cwg.Report) -> None:
        self.count: int = len(report.leaks)


def use() -> str:
    guard: cwg.Guard = cwg.install(grace=2.0, reporters=[reporter, Counting(), CapturingReporter()])
    cwg.install(cwg.Settings(stack_depth=0, context=lambda: {"a": 1}, redact=str.upper))
    with cwg.label("x"), cwg.no_leaks(grace=1.0), guard.no_leaks():
        report = cwg.scan(full=True)
    cwg.attribute("psycopg", "app.db:connect")
    guard.attribute("uvloop")
    cwg.uninstall()
    again: cwg.Report = cwg.from_dict(cwg.to_dict(report))
    return cwg.render_text(again)


@cwg.no_leaks()
def work(number: int) -> int:
    return number


@cwg.label("y")
async def work_async(number: int) -> int:
    async with cwg.no_leaks(grace=0.5):
        return work(number)
