"""The reporter `warn`: a Python warning at the line that leaks."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from closewait_guard._format import escape_line, page_of
from closewait_guard._render import verdict_name
from closewait_guard.model import Frame, Report, Reporter, SiteGroup

__all__ = [
    "SocketLeakWarning",
    "warn",
]


_NOWHERE = Frame("<unknown>", 0, "<unknown>", "<unknown>")


class SocketLeakWarning(RuntimeWarning):
    """A socket was leaked; the warning is attributed to the line that opened it.

    It is a `RuntimeWarning`, because Python ignores `ResourceWarning` by default.
    """


def warn() -> Reporter:
    """Warn of each site that leaks, at the site, so that filters by module and line work.

    It is shown unless a filter ignores it. The text of a site stays the same from report to report,
    so that a filter that shows a warning once, as the default one does, shows it once.
    """
    return _Warner()


class _Warner:
    def __init__(self) -> None:
        # For sites whose module is no longer loaded, or under another name: by file.
        self._registries: dict[str, dict[Any, Any]] = {}

    def __call__(self, report: Report, /) -> None:
        # Several stacks may lead to one line, which gets one warning.
        warned = {
            (group.site or _NOWHERE, _message(group)): None
            for group in report.by_site()
            if group.verdict.is_leak
        }
        failures = [self._try_to_warn(site, message) for site, message in warned]
        for failure in filter(None, failures):
            raise failure

    def __repr__(self) -> str:
        return "warn()"

    def _try_to_warn(self, site: Frame, message: str) -> Exception | None:
        """Return the error that a filter makes of the warning: the next site gets a warning too."""
        try:
            warnings.warn_explicit(
                escape_line(message),
                SocketLeakWarning,
                escape_line(site.filename),
                site.lineno,
                module=site.module,
                registry=self._registry_of(site),
            )
        except Exception as error:
            return error
        return None

    def _registry_of(self, site: Frame) -> dict[Any, Any]:
        """The interpreter's own record of the warnings that this module has given."""
        module = sys.modules.get(site.module)
        names = vars(module) if module is not None else {}
        if names.get("__file__") != site.filename:
            return self._registries.setdefault(site.filename, {})
        registry: dict[Any, Any] = names.setdefault("__warningregistry__", {})
        return registry


def _message(group: SiteGroup) -> str:
    """Without counts, times and peers, which differ from report to report."""
    opened = f", opened in {group.site.function}()" if group.site is not None else ""
    code = f" ({group.code}, {page_of(group.code)})" if group.code else ""
    owner = group.findings[0].observation.owner
    what = "socket" if owner is None else owner.name
    return f"{verdict_name(group.verdict)} {what}{opened.replace('>()', '>')}: {group.hint}{code}"
