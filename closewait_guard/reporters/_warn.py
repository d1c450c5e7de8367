"""A warning at the line that leaks, as if that line had given it."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from closewait_guard.model import Frame, Report, Reporter, SiteGroup
from closewait_guard.reporters._events import site_event

__all__ = ["SocketLeakWarning", "warn"]


class SocketLeakWarning(ResourceWarning):
    """A socket was leaked; the warning is attributed to the line that made it."""


def warn() -> Reporter:
    """Warn of each accused site, at the site, so that filters by module and line work.

    Like every `ResourceWarning` it is ignored unless it is asked for, as with `-W default` or
    `-W "default::ResourceWarning"`.
    """

    def warn_reporter(report: Report) -> None:
        for group in report.by_site():
            if group.verdict.accused:
                _warn(group, site_event(group, report.pid).sentence)

    return warn_reporter


def _warn(group: SiteGroup, sentence: str) -> None:
    site = group.site or Frame("<unknown>", 0, "<unknown>", "<unknown>")
    warnings.warn_explicit(
        sentence,
        SocketLeakWarning,
        site.filename,
        site.lineno,
        module=site.module,
        registry=_registry_of(site),
    )


def _registry_of(site: Frame) -> dict[Any, Any]:
    """Where the interpreter itself notes which warnings this module has given."""
    module = sys.modules.get(site.module)
    names = vars(module) if module is not None else {}
    if names.get("__file__") != site.filename:
        return {}
    registry: dict[Any, Any] = names.setdefault("__warningregistry__", {})
    return registry
