"""A reporter in ten lines: anything that can be called with a report.

python examples/custom_reporter.py
"""

from __future__ import annotations

import closewait_guard as cwg
from closewait_guard import reporters
from closewait_guard.testing import half_closed_pair


def page(report: cwg.Report) -> None:
    for group in report.by_site():
        where = group.site.call if group.site else "an unknown line"
        print(f"{group.code}: {group.count} {group.verdict}, opened at {where}")
    for alert in report.alerts:
        print(f"{alert.kind} {alert.status}: {alert.message}")
    for each in report.closed_late:
        print(f"closed late, after {each.after:.1f} s")


cwg.install(reporters=[reporters.changes(page)], grace=0)
with half_closed_pair():
    cwg.report()
    cwg.report()  # Nothing new: the reporter is not called.
cwg.report()
cwg.uninstall()
