"""Reports that a command has got: grouped by program, printed, and written to files."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from closewait_guard._render import LastReport, render_family
from closewait_guard._stream import layout_of, print_error
from closewait_guard.commands._output import say
from closewait_guard.exceptions import ConfigurationError

if TYPE_CHECKING:
    from closewait_guard._files import ReplacedFile
    from closewait_guard._format import Layout
    from closewait_guard._render import Part
    from closewait_guard.model import Report

__all__ = [
    "ReportFiles",
    "parts_of",
    "print_programs",
    "programs_of",
]


# The processes of a program report at the same intervals, or as it ends, one after another.
_MAX_SECONDS_APART = 60.0


def programs_of(reports: Sequence[Report]) -> list[list[LastReport]]:
    """Those of each program; one that never had a socket only where no other had any."""
    now = max(report.taken_at for report in reports)
    programs: dict[tuple[str, str], list[LastReport]] = {}
    for report in sorted(reports, key=lambda report: report.pid):
        member = LastReport(report, is_last=now - report.taken_at < _MAX_SECONDS_APART)
        programs.setdefault((report.host, report.command), []).append(member)
    families = list(programs.values())
    with_sockets = [each for each in families if any(member.has_sockets for member in each)]
    return with_sockets or families


def print_programs(
    programs: Iterable[Sequence[LastReport]], layout: Layout, *, is_complete: bool = True
) -> None:
    """Print each program by itself."""
    texts = (render_family(each, layout, is_complete=is_complete) for each in programs)
    say("\n".join(texts), end="")


def parts_of(programs: Iterable[Sequence[LastReport]], *, is_complete: bool = True) -> list[Part]:
    """The same programs, as parts of a page."""
    from closewait_guard._render import Part

    return [Part(each, is_complete=is_complete) for each in programs]


class ReportFiles:
    """The files that are to be written; whether that is possible is known before any work.

    Raises:
        ConfigurationError: One of them cannot be written.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._html = _file_of(arguments.html)
        self._collapsed = _file_of(arguments.collapsed)

    def __bool__(self) -> bool:
        return self._html is not None or self._collapsed is not None

    def write(self, parts: Sequence[Part], notes: Sequence[str] = ()) -> None:
        """Write them.

        Args:
            parts: The programs.
            notes: Sentences on what is missing.

        Raises:
            ConfigurationError: One of them cannot be written any more.
        """
        if not self:
            return
        from closewait_guard._render import collapsed_lines, count_stacks_of, render_page

        layout = layout_of()
        if self._html is not None:
            _write(self._html, render_page(parts, layout, notes))
        if self._collapsed is not None:
            lines = collapsed_lines(count_stacks_of(parts, layout))
            _write(self._collapsed, "".join(f"{line}\n" for line in lines))


def _file_of(path: str | None) -> ReplacedFile | None:
    if path is None:
        return None
    from closewait_guard._files import ReplacedFile

    try:
        return ReplacedFile(path)
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error


def _write(file: ReplacedFile, text: str) -> None:
    try:
        file.write(text.encode())
    except OSError as error:
        raise _cannot_write(file.path, error) from error
    print_error(f"written to {file.path}")


def _cannot_write(path: str, error: Exception) -> ConfigurationError:
    reason = getattr(error, "strerror", None) or error
    return ConfigurationError(f"cannot write {path}: {reason}")
