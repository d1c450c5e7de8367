"""IPython and Jupyter: `%load_ext closewait_guard`, `%closewait`, `%%no_leaks`.

A line of a cell is shown as IPython shows it, and so is what its history keeps. A report is shown
as a page in a notebook, as text elsewhere: in color in a terminal, where rich is installed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from closewait_guard._api import current_guard, install, no_leaks, scan, uninstall
from closewait_guard._capture import patch
from closewait_guard._delivery import render_text
from closewait_guard._format import pluralize, unique
from closewait_guard._stream import layout_of
from closewait_guard.exceptions import CloseWaitGuardError, MissingExtraError, SocketLeakError
from closewait_guard.model import Finding, Frame, Observation, Report, SocketRecord

try:
    from IPython.core.error import UsageError
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.core.magic import Magics, cell_magic, line_magic, magics_class
except ImportError as missing:
    raise MissingExtraError(
        f"this needs IPython: pip install 'closewait-guard[ipython]' ({missing})"
    ) from missing

__all__ = ["CloseWaitMagics", "load_ipython_extension", "unload_ipython_extension"]


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Record sockets from now on, and offer the magics."""
    magics = CloseWaitMagics(shell)
    install()
    shell.register_magics(magics)
    for kind, show in (("text/plain", magics.print_report), ("text/html", magics.render_html)):
        _formatters_of(shell)[kind].for_type(Report, show)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Leave everything as it was found."""
    magics: Any = shell.magics_manager.registry.pop(CloseWaitMagics.__name__, None)
    if magics is None or not magics.had_guard:
        uninstall()
    for kind in ("text/plain", "text/html"):
        _formatters_of(shell)[kind].pop(Report, None)
    for kind, name in (("line", "closewait"), ("cell", "no_leaks")):
        shell.magics_manager.magics[kind].pop(name, None)


def _formatters_of(shell: InteractiveShell) -> Any:
    formatter: Any = shell.display_formatter
    return formatter.formatters


@magics_class
class CloseWaitMagics(Magics):
    """The magics of one shell.

    Attributes:
        had_guard: The program had installed one before.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self._shell: Any = shell
        self._cells = _CellNames(shell)
        self.had_guard = current_guard() is not None

    @line_magic
    def closewait(self, line: str) -> Report | None:
        """Sockets of this kernel: `%closewait [scan | status | install | uninstall]`.

        `scan`, or nothing, returns the report of what leaks.
        """
        words = line.split() or ["scan"]
        actions: dict[str, Callable[[], Report | None]] = {
            "scan": scan,
            "status": self._print_status,
            "install": self._install,
            "uninstall": self._uninstall,
        }
        if len(words) != 1 or words[0] not in actions:
            raise UsageError(f"%closewait takes one of {', '.join(actions)}, not {line!r}")
        return actions[words[0]]()

    @cell_magic
    def no_leaks(self, line: str, cell: str) -> None:
        """Run the cell; it fails if it leaves a socket open: `%%no_leaks [SECONDS]`.

        SECONDS is how long sockets have to close after it, 1 by default.
        """
        try:
            grace = float(line or 1.0)
        except ValueError:
            raise UsageError(f"%%no_leaks takes a number of seconds, not {line!r}") from None
        self._make_loop(cell)
        block = no_leaks(grace)
        block.__enter__()
        with self._cells.running_inner():
            result = self._shell.run_cell(cell)
        failure = result.error_before_exec or result.error_in_exec
        try:
            block.__exit__(type(failure) if failure else None, failure, None)
        except SocketLeakError as error:
            report = self._cells.in_report(error.report)
            raise _CellLeakError(report, self._render_text(report)) from None
        if failure is not None:
            raise _CellFailedError(str(failure)) from None

    def print_report(self, report: Report, printer: Any, _: bool) -> None:
        """What a terminal shows of a report that is the value of a cell."""
        printer.text(self._render_text(self._cells.in_report(report)))

    def render_html(self, report: Report) -> str | None:
        """What a notebook shows of it; None where the text is all that there is to show."""
        from closewait_guard._render import sections

        report = self._cells.in_report(report)
        return _render_frame(report) if len(sections(report, layout_of())) > 1 else None

    def _render_text(self, report: Report) -> str:
        if str(self._shell.colors).lower() != "nocolor":
            from closewait_guard.reporters.console import render_for

            with suppress(MissingExtraError):
                return render_for(report, sys.stdout).rstrip("\n")
        return render_text(report).rstrip("\n")

    def _make_loop(self, cell: str) -> None:
        """Have the event loop for cells that await, which is made for the first and stays."""
        try:
            code = self._shell.transform_cell(cell)
        except SyntaxError:
            # It is shown when the cell runs.
            return
        if not self._shell.should_run_async(cell, transformed_cell=code):
            return
        nothing = _nothing()
        try:
            self._shell.loop_runner(nothing)
        except RuntimeError as error:
            # In Jupyter that loop runs the cell with the magic.
            nothing.close()
            raise UsageError(
                f"%%no_leaks cannot run a cell that awaits here ({error}): "
                "use `async with closewait_guard.no_leaks():` in an ordinary cell"
            ) from None

    def _install(self) -> None:
        install()
        self._print_status()

    def _uninstall(self) -> None:
        uninstall()
        self._print_status()

    def _print_status(self) -> None:
        if not patch.is_patched():
            print("closewait-guard is not installed: %closewait install")  # noqa: T201
            return
        report = scan()
        known = pluralize(report.coverage.opened, "socket")
        print(  # noqa: T201
            f"closewait-guard is installed: {known} opened since then, "
            f"{report.open_sockets:,} open, {pluralize(len(report.leaks), 'leak')}"
        )
        for note in report.coverage.notes:
            print(f"Not covered: {note}")  # noqa: T201


async def _nothing() -> None:
    """What an event loop runs, so that there is one."""


def _render_frame(report: Report) -> str:
    """The page of a report in a frame, which keeps its style and its script from the notebook's."""
    from closewait_guard._render import LastReport, Part, render_page

    page = render_page([Part([LastReport(report)])], layout_of())
    return (
        '<iframe title="closewait-guard" '
        'sandbox="allow-scripts allow-popups allow-popups-to-escape-sandbox" '
        # As high as the page of one site, if the window is.
        'style="width: 100%; height: min(1100px, 80vh); border: 0; resize: vertical" '
        f'srcdoc="{escape(page)}"></iframe>\n'
        # For copies, and where frames are not shown: an untrusted notebook, a site for sources.
        f"<details><summary>As text</summary><pre>{escape(render_text(report))}</pre></details>"
    )


class _CellNames:
    """Puts the number of a cell in place of the file that IPython pretends to run."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell
        # What a cell magic runs gets a number of its own, as the next cell.
        self._inner: dict[str, int] = {}

    def _numbers(self) -> dict[str, int]:
        """By the name of that file; IPython shows its tracebacks by it."""
        return getattr(self._shell.compile, "_filename_map", {}) | self._inner

    @contextmanager
    def running_inner(self) -> Iterator[None]:
        """Have what runs meanwhile be part of the cell that runs now."""
        before = self._numbers()
        yield
        if before:
            number = list(before.values())[-1]
            self._inner |= dict.fromkeys(self._numbers().keys() - before, number)

    def in_report(self, report: Report) -> Report:
        """The report with lines of cells, and what the history keeps, in words of IPython."""
        return replace(
            report,
            findings=tuple(map(self._in_finding, report.findings)),
            observations=tuple(map(self._in_observation, report.observations)),
        )

    def _in_finding(self, finding: Finding) -> Finding:
        observation = self._in_observation(finding.observation)
        holders = tuple(unique(map(self._in_holder, finding.holders)))
        if finding.caller in {Path(filename).stem for filename in self._numbers()}:
            # A kernel's name for the file of a cell is no package.
            package = "" if finding.package == finding.caller else finding.package
            finding = replace(finding, caller="", package=package)
        return replace(finding, observation=observation, holders=holders)

    def _in_observation(self, seen: Observation) -> Observation:
        return replace(seen, record=self._in_record(seen.record))

    def _in_record(self, record: SocketRecord) -> SocketRecord:
        stack = self._in_stack(record.stack)
        parent = self._in_record(record.parent) if record.parent is not None else None
        return replace(record, stack=stack, parent=parent)

    def _in_stack(self, stack: tuple[Frame, ...]) -> tuple[Frame, ...]:
        numbers, shown = self._numbers(), []
        for frame in stack:
            number = numbers.get(frame.filename)
            name = frame.filename if number is None else f"Cell In[{number}]"
            shown.append(replace(frame, filename=name))
            if number is not None and frame.function == "<module>":
                # What calls a cell is IPython.
                break
        return tuple(shown)

    def _in_holder(self, text: str) -> str:
        for filename, number in self._numbers().items():
            text = text.replace(filename, f"Cell In[{number}]")
        return _HISTORY.sub(_name_in_history, text)


# What a cell has returned: `Out[3]`, which is also `_3`, and `_`, `__`, `___` for the last three.
_HISTORY = re.compile(
    r"__main__\.(?:(?:Out|_oh)\[(?P<key>\d+)\]|_(?P<number>\d+)|(?P<last>_{1,3}))"
    r"(?P<rest>|[.[]\S*) \(module global\)"
)


def _name_in_history(match: re.Match[str]) -> str:
    number = match["key"] or match["number"]
    name = f"Out[{number}]" if number else match["last"]
    return f"IPython's output history ({name}{match['rest']})"


class _CellLeakError(SocketLeakError):
    """Shown as the report, without the calls of the magic."""

    def __init__(self, report: Report, shown: str) -> None:
        super().__init__(render_text(report).rstrip("\n"), report)
        self._shown = shown

    def _render_traceback_(self) -> list[str]:
        return self._shown.splitlines()


class _CellFailedError(CloseWaitGuardError):
    """The cell has raised, which IPython has shown; what runs a whole notebook stops here."""

    def _render_traceback_(self) -> list[str]:
        return []
