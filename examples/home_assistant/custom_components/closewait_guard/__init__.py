"""Leaked sockets by integration: the action `closewait_guard.report` of Home Assistant."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from homeassistant.const import EVENT_HOMEASSISTANT_STOP
from homeassistant.core import SupportsResponse

# By name: `closewait_guard.install` would be imported where it is used, in the event loop.
from closewait_guard import Finding, Report, install, scan, uninstall

if TYPE_CHECKING:
    from homeassistant.core import Event, HomeAssistant, ServiceCall

DOMAIN = "closewait_guard"
_INTEGRATION = re.compile(r"(?:custom_components|homeassistant\.components)\.\w+")


async def async_setup(hass: HomeAssistant, _config: dict[str, Any]) -> bool:
    """Record from now on which line opens a socket; offer the action."""
    # In a thread: it reads files.
    await hass.async_add_executor_job(install)

    async def report(_: ServiceCall) -> dict[str, Any]:
        return summarize(await hass.async_add_executor_job(scan))

    async def stop(_: Event) -> None:
        uninstall()

    hass.services.async_register(DOMAIN, "report", report, supports_response=SupportsResponse.ONLY)
    hass.bus.async_listen_once(EVENT_HOMEASSISTANT_STOP, stop)
    return True


def summarize(report: Report) -> dict[str, Any]:
    """The leaks of a report, by the integration that opened them, the most first."""
    groups: dict[str, list[Finding]] = defaultdict(list)
    for leak in report.leaks:
        groups[integration_of(leak)].append(leak)
    found = sorted(groups.items(), key=lambda group: -len(group[1]))
    total = len(report.leaks)
    return {
        "leaked": total,
        "open": report.open_sockets,
        "summary": [f"{name}: {len(leaks)} of {total}" for name, leaks in found],
        "integrations": [
            {"integration": name, "leaked": len(leaks), **details(leaks[0])}
            for name, leaks in found
        ],
        "report": str(report),
    }


def integration_of(leak: Finding) -> str:
    """The innermost integration among the calls, or else the package that opened it."""
    for frame in leak.observation.record.blamed.stack:
        if name := _INTEGRATION.match(frame.module):
            return name[0]
    return leak.caller or leak.package or "unknown"


def details(leak: Finding) -> dict[str, str]:
    """One of its sockets: the line that opened it, where it leads, what to change."""
    frame = next(
        (each for each in leak.observation.record.blamed.stack if _INTEGRATION.match(each.module)),
        leak.observation.record.site,
    )
    return {
        "opened": frame.call if frame is not None else "unknown",
        "peer": leak.observation.peer or "",
        "fix": leak.hint,
    }
