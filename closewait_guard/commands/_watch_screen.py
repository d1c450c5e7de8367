"""The screen of `watch`: states with sparklines, then the leaks with most sockets; and its keys."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from typing import Any, Self

from closewait_guard._format import escape_control, format_duration, pluralize
from closewait_guard._render import verdict_name
from closewait_guard._rich import Console, Group, RenderableType, Table, Text
from closewait_guard.commands._watch_state import Offender, ScanHistory, sparkline
from closewait_guard.model import Severity

__all__ = [
    "Keyboard",
    "picture",
]


_COLOURS = {Severity.INFO: "", Severity.WARNING: "yellow", Severity.CRITICAL: "bold red"}
# What stands beside a sparkline, and the lines that are neither states nor offenders.
_BESIDE, _AROUND = 30, 6
_COLUMNS = ("PROGRAM", "PID", "COUNT", "", "VERDICT", "PEER", "CODE", "SINCE", "UNREAD")
_ON_THE_RIGHT = frozenset({"PID", "COUNT", "", "SINCE", "UNREAD"})
# Where a terminal has not so many columns, the others stay readable without these.
_WIDE, _ONLY_WIDE = 80, frozenset({"CODE", "UNREAD"})


def picture(history: ScanHistory, console: Console, interval: float) -> RenderableType:
    """Everything at this moment, as large as the terminal."""
    width, height = console.size
    states = _states(history, width - _BESIDE, plain=console.options.ascii_only)
    room = max(1, height - _AROUND - len(history.states))
    parts: list[RenderableType] = [_title(history, interval), Text(), states, Text()]
    offenders = history.offenders[:room]
    parts.append(_offenders(offenders, width) if offenders else _nothing())
    if len(history.offenders) > room:
        parts.append(Text(f"and {len(history.offenders) - room:,} more", style="dim"))
    return Group(*parts)


def _title(history: ScanHistory, interval: float) -> Text:
    title = Text("closewait-guard watch", style="bold", no_wrap=True, overflow="ellipsis")
    processes = pluralize(history.processes, "process")
    text = f"{pluralize(history.sockets, 'socket')} in {processes}"
    title.append(
        f"  {time.strftime('%H:%M:%S')}, {text}, every {interval:g} s; q quits", style="not bold"
    )
    return title


def _states(history: ScanHistory, width: int, *, plain: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True, min_width=12)
    table.add_column(justify="right", min_width=7)
    table.add_column(justify="right", min_width=7)
    table.add_column(no_wrap=True)
    for state, counts in sorted(history.states.items(), key=lambda item: -item[1][-1]):
        style = "bold" if state == "CLOSE_WAIT" else ""
        line = Text(sparkline(counts, width, plain=plain))
        now = Text(f"{counts[-1]:,}", style=style)
        name = Text(escape_control(state), style=style)
        table.add_row(name, now, _change(history.change(state)), line)
    return table


def _change(change: int) -> Text:
    return Text(f"{change:+,}", style="bold reverse") if change else Text()


def _offenders(offenders: list[Offender], width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", expand=True)
    shown = [name for name in _COLUMNS if width >= _WIDE or name not in _ONLY_WIDE]
    for name in shown:
        right = name in _ON_THE_RIGHT
        table.add_column(
            name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis"
        )
    for each in offenders:
        cells = dict(zip(_COLUMNS, _cells(each), strict=True))
        table.add_row(*(cells[name] for name in shown), style=_COLOURS[each.severity])
    return table


def _cells(each: Offender) -> Iterator[Text]:
    yield Text(escape_control(each.program))
    yield Text(str(each.pid))
    yield Text(f"{each.many:,}")
    yield _change(each.change)
    yield Text(verdict_name(each.verdict))
    yield Text(escape_control(each.peer))
    yield Text(each.code)
    yield Text(_since(each))
    yield Text(f"{each.unread:,}" if each.unread else "")


def _since(each: Offender) -> str:
    if each.oldest is None:
        return "?"
    text = format_duration(each.oldest, at_least=each.is_lower_bound)
    # As short as a column of numbers.
    return "?" if text == "an unknown time" else text.replace("less than ", "< ")


def _nothing() -> Text:
    return Text("no leaks", style="green")


try:
    import termios
    import tty
except ImportError:  # Windows
    termios = tty = None  # type: ignore[assignment]


class Keyboard:
    """While the block lasts, keys come one by one and are not shown."""

    def __init__(self) -> None:
        self._fd = -1
        self._before: list[Any] = []

    def __enter__(self) -> Self:
        try:
            if termios is not None and sys.stdin.isatty():
                fd = sys.stdin.fileno()
                self._before = termios.tcgetattr(fd)
                tty.setcbreak(fd)
                self._fd = fd
        except (OSError, ValueError, AttributeError):
            # No stdin, or one that was closed: then there are no keys.
            self._fd = -1
        return self

    def __exit__(self, *failure: object) -> None:
        if self._fd >= 0:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def key(self, seconds: float) -> str:
        """The key that is typed within some time; empty if none is."""
        if self._fd < 0:
            time.sleep(seconds)
            return ""
        if not select.select([self._fd], [], [], seconds)[0]:
            return ""
        typed = os.read(self._fd, 1)
        if not typed:
            # The terminal has gone away.
            self._fd = -1
        return typed.decode("ascii", "replace")
