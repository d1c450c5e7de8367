"""`watch`: look at processes from outside again and again."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from closewait_guard._format import escape_line
from closewait_guard.commands._output import FINE, USAGE, say
from closewait_guard.commands._parser import add_metrics, add_no_config, parse_argument, settings_of
from closewait_guard.commands.scan import add_targets, pids_of, print_inaccessible

if TYPE_CHECKING:
    from closewait_guard._processes import ProcessScan
    from closewait_guard.commands._watch_state import ScanHistory


_DESCRIPTION = """\
Refresh `scan` continuously: sockets by state with their history, and the
processes that leak most. On a pipe, print one line for each refresh.
Press q to quit."""
_EPILOG = """\
exit status: 0 quit, or the processes have ended; 2 usage error or no such
             process
example:     closewait-guard watch 4242 --interval 1"""

_LOOKS_AT_KEYS = 0.2


def prepare(parser: argparse.ArgumentParser) -> None:
    """Say what can be given."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add_targets(parser)
    parser.add_argument(
        "--interval",
        type=_interval,
        default=2.0,
        metavar="SECONDS",
        help="refresh interval (default: 2)",
    )
    parser.add_argument("--count", type=_count, metavar="N", help="stop after N refreshes")
    add_metrics(parser)
    parser.add_argument(
        "--web",
        nargs="?",
        type=_address,
        const=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="serve a live page for the browser, on loopback",
    )
    add_no_config(parser)
    parser.set_defaults(run=run)


def _interval(text: str) -> float:
    from closewait_guard._config import number_parser

    what = "a number of seconds from 0.1 to 86,400"
    return parse_argument(number_parser(what, lambda number: 0.1 <= number <= 86_400), text)


def _count(text: str) -> int:
    from closewait_guard._config import whole_number_parser

    what = "a positive integer"
    return parse_argument(whole_number_parser(what, lambda number: number > 0), text)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        from closewait_guard._config import shown

        raise argparse.ArgumentTypeError(
            f"expected HOST:PORT, got {shown(text)} (a PID stands before --web)"
        )
    return host or "127.0.0.1", int(port)


def run(arguments: argparse.Namespace) -> int:
    """Scan until there is nothing left to scan, or the reader stops it."""
    from closewait_guard.commands._watch_state import ScanHistory

    history = ScanHistory()
    scans = _scans(arguments, history)
    if arguments.metrics:
        from closewait_guard.commands._metrics import with_metrics

        scans = with_metrics(scans, arguments.metrics)
    # Processes that cannot be scanned are reported before anything is drawn.
    first = next(scans)
    if print_inaccessible(first, arguments.pids) and not first.processes:
        return USAGE
    if arguments.web:
        return _serve(arguments, first, scans)
    if sys.stdout.isatty():
        return _draw(arguments, history, scans)
    return _print_lines(arguments, history, scans)


def _scans(arguments: argparse.Namespace, history: ScanHistory) -> Iterator[ProcessScan]:
    """One look each time; none any more when the processes have ended, or it has been enough."""
    from closewait_guard._processes import ProcessScanner

    scanner = ProcessScanner(settings_of(arguments))
    taken = 0
    while arguments.count is None or taken < arguments.count:
        found = scanner.scan(pids_of(arguments, scanner))
        if taken and not found.processes:
            return
        history.take(found)
        taken += 1
        yield found


def _serve(arguments: argparse.Namespace, found: ProcessScan, scans: Iterator[ProcessScan]) -> int:
    """Keep a page of the latest scan, for those who know its address."""
    from closewait_guard.commands._watch_web import FullReports, PageServer, live_page

    server, full_reports = PageServer(arguments.web), FullReports()
    scan: ProcessScan | None = found
    while scan is not None:
        pythons = (each.report.pid for each in scan.processes if each.report.python)
        server.page = live_page(
            scan, full_reports.of(pythons), arguments.interval, everything=bool(arguments.pids)
        ).encode()
        if scan is found:
            say(f"{server.url}  (Ctrl-C ends it)", flush=True)
        time.sleep(arguments.interval)
        scan = next(scans, None)
    return FINE


def _print_lines(
    arguments: argparse.Namespace, history: ScanHistory, scans: Iterator[ProcessScan]
) -> int:
    while True:
        say(_line(history), flush=True)
        time.sleep(arguments.interval)
        if next(scans, None) is None:
            return FINE


def _line(history: ScanHistory) -> str:
    """One look: the states with what has changed, and the worst offender."""
    from closewait_guard._render import verdict_name

    parts = [time.strftime("%H:%M:%S")]
    for state, counts in sorted(history.states.items(), key=lambda item: -item[1][-1]):
        change = history.change(state)
        parts.append(f"{state} {counts[-1]:,}" + (f" ({change:+,})" if change else ""))
    if history.offenders:
        worst = history.offenders[0]
        parts.append(
            f"worst: {worst.many:,} {verdict_name(worst.verdict)} {worst.peer} in {worst.program} "
            f"(pid {worst.pid}), {worst.code}"
        )
    else:
        parts.append("no leaks")
    return escape_line("  ".join(parts))


def _draw(arguments: argparse.Namespace, history: ScanHistory, scans: Iterator[ProcessScan]) -> int:
    from closewait_guard._rich import Console, Live
    from closewait_guard.commands._watch_screen import Keyboard, picture

    console = Console()
    if console.is_dumb_terminal:
        return _print_lines(arguments, history, scans)
    # The terminal is to be left as it was, however this ends; and not while it is drawn on.
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    if hasattr(signal, "SIGTSTP"):
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    with Keyboard() as keyboard, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            due = time.monotonic() + arguments.interval
            size = None
            while (left := due - time.monotonic()) > 0:
                if console.size != size:
                    size = console.size
                    live.update(picture(history, console, arguments.interval), refresh=True)
                if keyboard.key(min(left, _LOOKS_AT_KEYS)) in ("q", "Q"):
                    return FINE
            if next(scans, None) is None:
                return FINE


def _exit_on_sigterm(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
