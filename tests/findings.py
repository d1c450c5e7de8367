"""What a guard finds, as soon as it finds it."""

from __future__ import annotations

import asyncio
import re
import time

import closewait_guard as cwg


def findings_of(guard, verdict, count=1, deadline=10.0):
    """The leaks of a verdict, as soon as there are so many."""
    end, scans = time.monotonic() + deadline, 0
    # On a busy machine the first may take as long as all of them: a second tells what has lasted.
    while time.monotonic() < end or scans < 3:
        found = [leak for leak in guard.scan().findings if leak.verdict is verdict]
        if len(found) >= count:
            return found
        time.sleep(0.03)
        scans += 1
    raise AssertionError(cwg.render_text(guard.scan(full=True)))


def reports_in(text):
    """The beginning of each report in a text: its header, or the line that is all of it."""
    first = r"^closewait-guard(?:  |: (?:no leaks|leaks unknown|[\d,]+ leaked )).*"
    return re.findall(first, text, re.MULTILINE)


async def findings_of_async(guard, verdict, count=1):
    return await asyncio.to_thread(findings_of, guard, verdict, count)


def opened_in(leaks, site):
    """Those that were opened in a function of this file."""
    return [
        leak
        for leak in leaks
        if (found := leak.observation.record.site) and found.function.endswith(site)
    ]


def are_of_a_pool_for_each_call(leaks, hint):
    assert len(leaks) == 25
    assert "one of 25 pools for this address" in leaks[0].holders[-1]
    assert all(hint in leak.hint for leak in leaks)
