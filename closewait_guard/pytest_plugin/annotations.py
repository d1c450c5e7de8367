"""Leaks as GitHub shows them beside the line of code: pure."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from closewait_guard._lines import one_line
from closewait_guard._words import count_of
from closewait_guard.pytest_plugin.finding import Finding, Outcome
from closewait_guard.pytest_plugin.sites import Site, relative, sites

__all__ = ["commands"]

_LEVELS = {Outcome.FAILED: "error", Outcome.WARNED: "warning"}


def commands(findings: Iterable[Finding], root: Path) -> Iterator[str]:
    """One command of GitHub Actions for each birth site."""
    for site in sites(findings):
        level = _LEVELS.get(site.outcome)
        if level is not None and site.frame is not None:
            path = _relative(site.frame.filename, root)
            yield f"::{level} file={_escaped(path, ',:')},line={site.frame.lineno}::{_said(site)}"


def _said(site: Site) -> str:
    sockets = count_of(len(site.leaks), "socket")
    hint = site.leaks[0].hint
    return _escaped(f"{sockets} born here leaked by {site.who()}; fix: {hint}")


def _relative(filename: str, root: Path) -> str:
    """Relative to the checkout: GitHub knows no other files."""
    base = os.environ.get("GITHUB_WORKSPACE") or str(root)
    path = relative(filename, base)
    return path if path == filename else path.replace("\\", "/")


def _escaped(text: str, further: str = "") -> str:
    text = one_line(text)
    for character in "%\r\n" + further:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
